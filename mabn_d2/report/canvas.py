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
    kind = os.path.splitext(os.fspath(picture))[1]
    if kind not in (".png", ".svg"):
        raise ValueError(f"{picture} must end in .png or .svg")
    with atomic_write(os.fspath(picture)) as f:
        figure.savefig(f, format=kind[1:], dpi=DPI)
