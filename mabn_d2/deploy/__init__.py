"""Detectors as files that run without this package, and detectors at work."""

from ..utils import needs_detectron2  # noqa: F401
from .exporting import FORMATS, export_detector
from .predicting import Predictor, draw, metadata_of
from .running import ExportedDetector

__all__ = [
    "FORMATS",
    "ExportedDetector",
    "Predictor",
    "draw",
    "export_detector",
    "metadata_of",
]
