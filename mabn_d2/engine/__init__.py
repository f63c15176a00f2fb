"""The trainer and its hooks."""
from .hooks import SyncNormStatistics
from .trainer import Trainer

__all__ = ["SyncNormStatistics", "Trainer"]
