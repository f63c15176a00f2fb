"""Every check before the workers start, for both kinds of config."""

from .config import check
from .datasets import Needs, check_dataset, check_training_data
from .files import check_weights
from .lazy import check_lazy, check_lazy_config, items

__all__ = [
    "Needs",
    "check",
    "check_dataset",
    "check_lazy",
    "check_lazy_config",
    "check_training_data",
    "check_weights",
    "items",
]
