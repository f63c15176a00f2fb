"""The batch statistics of normalization layers, as numbers. For any PyTorch model."""

from .recorder import Record, StatisticsRecorder, is_norm, select_norms

__all__ = ["Record", "StatisticsRecorder", "is_norm", "select_norms"]
