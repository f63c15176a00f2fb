"""Changes to models: which convolution feeds which norm, and what is done about it."""

from .centralization import CENTRALIZED_CLASSES, centralize, centralize_convolution
from .conversion import convert, convertible_sites
from .folding import fold, foldable_sites
from .importing import import_batch_norm, keep_kernel_mean
from .norm_batches import set_norm_batch_size
from .sites import NormSite, find_norm_sites, needs_centralized_kernel
from .weights import Imported, from_bn, import_state_dict, measure_statistics

__all__ = [
    "CENTRALIZED_CLASSES",
    "Imported",
    "NormSite",
    "centralize",
    "centralize_convolution",
    "convert",
    "convertible_sites",
    "find_norm_sites",
    "fold",
    "foldable_sites",
    "from_bn",
    "import_batch_norm",
    "import_state_dict",
    "keep_kernel_mean",
    "measure_statistics",
    "needs_centralized_kernel",
    "set_norm_batch_size",
]
