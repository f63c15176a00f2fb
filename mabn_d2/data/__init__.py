"""Synthetic COCO-format data sets, for training and testing without a download."""

from ..utils import needs_detectron2  # noqa: F401
from .catalog import register_shapes
from .synthetic import make_synthetic_coco

__all__ = ["make_synthetic_coco", "register_shapes"]
