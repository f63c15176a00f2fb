"""What a training loop of one's own calls, in plain PyTorch."""

from .averaging import average_norm_statistics, norm_statistics
from .double_forward import DoubleForward
from .grad_scaler import follow_grad_scaler
from .population import population_statistics
from .recording import no_recording
from .virtual_workers import VirtualWorkers

__all__ = [
    "DoubleForward",
    "VirtualWorkers",
    "average_norm_statistics",
    "follow_grad_scaler",
    "no_recording",
    "norm_statistics",
    "population_statistics",
]
