"""The generated data set in COCO's format."""

from .make import LAYOUTS, SHAPES_FOLDERS, VARIETIES, make_synthetic_coco

__all__ = ["LAYOUTS", "SHAPES_FOLDERS", "VARIETIES", "make_synthetic_coco"]
