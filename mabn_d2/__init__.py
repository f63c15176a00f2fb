"""
Moving Average Batch Normalization (MABN, ICLR 2020) for Detectron2.

Importing the package registers the norms: `MODEL.RESNETS.NORM: MABN` then works in any Detectron2
config, in any script.
"""
try:
    import detectron2  # noqa: F401
except ImportError as e:
    raise ImportError(
        "mabn_d2 needs Detectron2, which is not installed. For Python 3.10 and torch 2.3: "
        'pip install "setuptools<81" "numpy<2" sal-detectron2==0.7.2. For other versions see '
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    ) from e

from .config import add_mabn_config
from .layers import BRN2d, CenConv2d, DoubleForward, MABN2d, MBN2d
from .norms import NORM_REGISTRY, install, uninstall
from .surgery import centralize, set_norm_batch_size

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
    "install",
    "set_norm_batch_size",
    "uninstall",
]

install()
