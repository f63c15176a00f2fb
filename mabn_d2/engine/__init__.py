"""The trainer and its hooks."""
from .hooks import (
    PreciseStatistics,
    SyncNormStatistics,
    average_norm_statistics,
    norm_statistics,
    update_norm_statistics,
)
from .trainer import Trainer

__all__ = [
    "PreciseStatistics",
    "SyncNormStatistics",
    "Trainer",
    "average_norm_statistics",
    "norm_statistics",
    "update_norm_statistics",
]
