"""What inference costs with each norm, as bars."""

from ..benchmark.inference import Result
from .canvas import COLOURS, GREY, new_figure, save


def plot_inference(
    results: list[Result], paper: dict[str, float], title: str, picture: str
) -> None:
    """
    Draws the iterations per second of networks relative to the first one, beside those of a paper.

    Args:
        paper: iterations per second by the network's name; empty if there is none.
        picture: a file *.png or *.svg.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the name of the picture ends otherwise.
    """
    figure = new_figure(8, 4, layout="constrained")
    axes = figure.subplots()
    first = results[0]
    width = 0.4
    offsets = [width / 2 if result.name in paper else 0.0 for result in results]
    places = [i - offset for i, offset in enumerate(offsets)]
    measured = [1 / result.ratio(first) for result in results]
    bars = axes.bar(places, measured, width, color=COLOURS[0], label="measured")
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    reported = [(i, paper[result.name]) for i, result in enumerate(results) if offsets[i]]
    if reported:
        beside, heights = zip(*((i + width / 2, n / paper[first.name]) for i, n in reported))
        bars = axes.bar(beside, heights, width, color=GREY, label="the paper's, on its GPU")
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set_xticks(range(len(results)), [result.name for result in results])
    axes.set_ylabel(f"iterations/s, relative to {first.name}")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, picture)
