"""The trainers and their hooks."""

from ..utils import needs_detectron2  # noqa: F401
from .hooks import PreciseStatistics, SyncNormStatistics, update_norm_statistics
from .lazy import LazyTrainer, load_lazy_config
from .preflight import check_lazy_config
from .trainer import Trainer

__all__ = [
    "LazyTrainer",
    "PreciseStatistics",
    "SyncNormStatistics",
    "Trainer",
    "check_lazy_config",
    "load_lazy_config",
    "update_norm_statistics",
]
