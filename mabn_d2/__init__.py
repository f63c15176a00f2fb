"""
Moving Average Batch Normalization (MABN, ICLR 2020) for Detectron2.

Importing the package registers the norms: `MODEL.RESNETS.NORM: MABN` then works in any Detectron2
config, in any script. Without Detectron2 the layers, the surgery on models and the training tools
work for any PyTorch model.
"""

import importlib.util

from .layers import BRN2d, CenConv2d, MABN2d, MBN2d
from .surgery import centralize, convert, fold, from_bn, set_norm_batch_size
from .training import DoubleForward

__version__ = "0.1.0"
__all__ = [
    "NORM_REGISTRY",
    "BRN2d",
    "CenConv2d",
    "DoubleForward",
    "MABN2d",
    "MBN2d",
    "add_mabn_config",
    "centralize",
    "convert",
    "fold",
    "from_bn",
    "install",
    "set_norm_batch_size",
    "uninstall",
]

if importlib.util.find_spec("detectron2") is not None:
    from .plugin import NORM_REGISTRY, add_mabn_config, install, uninstall

    install()
else:
    from .training.bn_tools import guard_bn_tools

    guard_bn_tools()

    def __getattr__(name):
        if name in ("NORM_REGISTRY", "add_mabn_config", "install", "uninstall"):
            from .utils import needs_detectron2  # noqa: F401  raises
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
