"""Changes to models: which convolution feeds which norm, and what is done about it."""

from .centralization import CENTRALIZED_CLASSES, centralize, centralize_convolution
from .folding import fold, foldable_sites
from .norm_batches import set_norm_batch_size
from .sites import NormSite, find_norm_sites, needs_centralized_kernel

__all__ = [
    "CENTRALIZED_CLASSES",
    "NormSite",
    "centralize",
    "centralize_convolution",
    "find_norm_sites",
    "fold",
    "foldable_sites",
    "needs_centralized_kernel",
    "set_norm_batch_size",
]
