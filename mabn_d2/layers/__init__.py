"""The norms and the centralized convolution, in plain PyTorch."""

from .batch_norm import BatchStatisticsNorm2d, GhostBatchNorm2d
from .brn import BRN2d
from .centralized_conv import CenConv2d, CenConvTranspose2d, CentralizedKernel, centralize_kernel
from .mabn import MABN2d
from .mbn import MBN2d
from .moving_average import MovingAverage
from .norm import Norm2d

__all__ = [
    "BRN2d",
    "BatchStatisticsNorm2d",
    "CenConv2d",
    "CenConvTranspose2d",
    "CentralizedKernel",
    "GhostBatchNorm2d",
    "MABN2d",
    "MBN2d",
    "MovingAverage",
    "Norm2d",
    "centralize_kernel",
]
