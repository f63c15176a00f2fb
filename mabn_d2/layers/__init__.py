"""The norms and the centralized convolution, in plain PyTorch."""
from .centralized_conv import CenConv2d, CenConvTranspose2d, CentralizedKernel, centralize_kernel
from .mabn import MABN2d, follow_grad_scaler, population_statistics
from .moving_average import MovingAverage

__all__ = [
    "CenConv2d",
    "CentralizedKernel",
    "MABN2d",
    "MovingAverage",
    "centralize_kernel",
    "follow_grad_scaler",
    "population_statistics",
]
