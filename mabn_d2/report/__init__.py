"""Pictures and a table of a training run, made from its output folder."""

from ..utils import needs_detectron2  # noqa: F401
from .curves import plot_curves
from .detections import found_sentence
from .metrics import METRICS, ap_table, read_metrics
from .predictions import draw_comparison, draw_predictions

__all__ = [
    "METRICS",
    "ap_table",
    "draw_comparison",
    "draw_predictions",
    "found_sentence",
    "plot_curves",
    "read_metrics",
]
