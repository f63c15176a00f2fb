"""Detectors as files that run without this package."""

from ..utils import needs_detectron2  # noqa: F401
from .exporting import FORMATS, export_detector
from .running import ExportedDetector

__all__ = ["FORMATS", "ExportedDetector", "export_detector"]
