"""The trainers and their hooks."""
from .hooks import (
    PreciseStatistics,
    SyncNormStatistics,
    average_norm_statistics,
    norm_statistics,
    update_norm_statistics,
)
from .lazy import LazyTrainer, check_lazy_config, load_lazy_config
from .trainer import Trainer

__all__ = [
    "LazyTrainer",
    "PreciseStatistics",
    "SyncNormStatistics",
    "Trainer",
    "average_norm_statistics",
    "check_lazy_config",
    "load_lazy_config",
    "norm_statistics",
    "update_norm_statistics",
]
