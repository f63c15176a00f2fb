"""The generated data set in COCO's format."""

from .make import LAYOUTS, LOOK_CHOICES, make_synthetic_coco

__all__ = ["LAYOUTS", "LOOK_CHOICES", "make_synthetic_coco"]
