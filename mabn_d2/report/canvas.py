"""Figures apart from pyplot and its global state, and the colours of all pictures.

The pictures need matplotlib; everything else in the package works without it.
"""

import os

from ..utils.files import atomic_write

DPI = 100
GREY = "0.4"
# Vivid colours, to be seen on all backgrounds.
COLOURS = (
    "#1e9bff", "#ff9500", "#2fd158", "#ff453a", "#bf5af2",
    "#ffd60a", "#00d8d8", "#ff5fa8", "#a5e05a", "#d0a070",
)  # fmt: skip


def new_figure(width: float, height: float, **options):
    """An empty figure of a size in inches, apart from pyplot and its global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def save(figure, picture: str) -> None:
    """
    Raises:
        ValueError: the name does not end in .png or .svg.
    """
    kind = kind_of(picture)
    with atomic_write(os.fspath(picture)) as f:
        figure.savefig(f, format=kind, dpi=DPI)


def kind_of(picture: str) -> str:
    """
    "png" or "svg".

    Raises:
        ValueError: the name does not end in .png or .svg.
    """
    kind = os.path.splitext(os.fspath(picture))[1]
    if kind not in (".png", ".svg"):
        raise ValueError(f"{picture} must end in .png or .svg")
    return kind[1:]


def class_colour(number: int, classes: int) -> tuple[float, ...]:
    """RGB of one of the classes: ten that differ well, or else spread around the colour circle."""
    from matplotlib import colors

    if number < classes <= len(COLOURS):
        return colors.to_rgb(COLOURS[number])
    golden = 0.618034
    return tuple(colors.hsv_to_rgb((number * golden % 1, 0.85, (0.95, 0.75)[number % 2])))
