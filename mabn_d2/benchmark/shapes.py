"""The inputs that the norms of real networks see."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Input of some of the model's norms: (N, C, H, W) and how many of its norms have it."""

    name: str
    size: tuple[int, int, int, int]
    norms: int
    quick: bool = False  # whether it is part of the quick run


SHAPES = [
    Shape("stem", (2, 64, 400, 672), 1),
    Shape("res2 inner", (2, 64, 200, 336), 6, quick=True),
    Shape("res2 out, FPN", (2, 256, 200, 336), 6),
    Shape("res3 inner", (2, 128, 100, 168), 8, quick=True),
    Shape("res3 out", (2, 512, 100, 168), 5),
    Shape("FPN stride 8", (2, 256, 100, 168), 2),
    Shape("res4 inner, FPN", (2, 256, 50, 84), 14, quick=True),
    Shape("res4 out", (2, 1024, 50, 84), 7),
    Shape("res5 inner", (2, 512, 25, 42), 6, quick=True),
    Shape("res5 out", (2, 2048, 25, 42), 4),
    Shape("FPN stride 32", (2, 256, 25, 42), 2),
    Shape("box head", (1024, 256, 7, 7), 4, quick=True),
    Shape("mask head", (256, 256, 14, 14), 4, quick=True),
]
SHAPES_RESNET50 = [
    Shape("stem", (32, 64, 112, 112), 1),
    Shape("res2 inner", (32, 64, 56, 56), 6),
    Shape("res2 out", (32, 256, 56, 56), 4),
    Shape("res3 first", (32, 128, 56, 56), 1),
    Shape("res3 inner", (32, 128, 28, 28), 7),
    Shape("res3 out", (32, 512, 28, 28), 5),
    Shape("res4 first", (32, 256, 28, 28), 1),
    Shape("res4 inner", (32, 256, 14, 14), 11),
    Shape("res4 out", (32, 1024, 14, 14), 7),
    Shape("res5 first", (32, 512, 14, 14), 1),
    Shape("res5 inner", (32, 512, 7, 7), 5),
    Shape("res5 out", (32, 2048, 7, 7), 4),
]
CHOICES_OF_SHAPES = {
    "all": SHAPES,
    "quick": [shape for shape in SHAPES if shape.quick],
    "resnet50": SHAPES_RESNET50,
}
