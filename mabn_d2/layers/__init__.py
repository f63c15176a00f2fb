"""The norms and the centralized convolution, in plain PyTorch."""

from .batch_norm import BatchStatisticsNorm2d, GhostBatchNorm2d
from .brn import BRN2d
from .centralized_conv import CenConv2d, CenConvTranspose2d, CentralizedKernel, centralize_kernel
from .mabn import MABN2d
from .mbn import MBN2d
from .norm import Norm2d
from .options import check_options, checked, marked_options, options_of
from .ring_buffer import RingBuffer

__all__ = [
    "BRN2d",
    "BatchStatisticsNorm2d",
    "CenConv2d",
    "CenConvTranspose2d",
    "CentralizedKernel",
    "GhostBatchNorm2d",
    "MABN2d",
    "MBN2d",
    "Norm2d",
    "RingBuffer",
    "centralize_kernel",
    "check_options",
    "checked",
    "marked_options",
    "options_of",
]
