"""The norms and the centralized convolution, in plain PyTorch."""
from .batch_norm import BatchStatisticsNorm2d, GhostBatchNorm2d
from .brn import BRN2d
from .centralized_conv import CenConv2d, CenConvTranspose2d, CentralizedKernel, centralize_kernel
from .double_forward import DoubleForward
from .mabn import MABN2d, follow_grad_scaler
from .mbn import MBN2d
from .moving_average import MovingAverage
from .norm import Norm2d
from .population import population_statistics

__all__ = [
    "BRN2d",
    "BatchStatisticsNorm2d",
    "CenConv2d",
    "CentralizedKernel",
    "DoubleForward",
    "GhostBatchNorm2d",
    "MABN2d",
    "MBN2d",
    "MovingAverage",
    "Norm2d",
    "centralize_kernel",
    "follow_grad_scaler",
    "population_statistics",
]
