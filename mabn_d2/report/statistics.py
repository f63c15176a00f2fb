"""The batch statistics of norms over the iterations, as the paper's Figure 2 draws them."""

import os
import re
from collections.abc import Sequence

import numpy as np

from .canvas import GREY, new_figure, save
from .metrics import METRICS, Metrics, read_metrics, series

# The paper's four panels: quantity of the recorder -> its title.
PANELS = {
    "mean": r"$\Vert\mu_B\Vert$, forward",
    "var": r"$\Vert\sigma^2_B\Vert$, forward",
    "grad_mean": r"$\Vert g_B\Vert$, backward",
    "grad_dot": r"$\Vert\Psi_B\Vert$, backward",
}
# What a MABN uses in the place of a panel's statistic.
AVERAGES = {"var": "second_moment_average", "grad_dot": "psi_average"}
# Okabe and Ito's colours, which differ for colour-blind readers, too.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_AVERAGE_COLOUR = "black"
_STYLES = ("-", "--", "-.", ":")


def recorded_layers(metrics: Metrics) -> list[str]:
    """The norms of which a run has recorded statistics, in the order of the model."""
    keys = dict.fromkeys(key for values in metrics.values() for key in values)
    names = (re.fullmatch(r"statistics/(.+)/mean", key) for key in keys)
    return [match[1] for match in names if match]


def plot_statistics(
    runs: Sequence[str], picture: str, layer: str | None = None, labels: Sequence[str] = ()
) -> str:
    """
    Draws the paper's four panels for one layer, with several runs overlaid.

    Args:
        runs: output folders of runs with `STATISTICS.ENABLED`.
        picture: .png or .svg file to write.
        layer: a norm's name; by default the first that all runs have.
        labels: of the runs; by default the names of their folders.

    Returns:
        the layer's name.

    Raises:
        FileNotFoundError: a run has no `metrics.json`.
        ValueError: a run has no statistics of the layer, or the file's type is unknown.
        ImportError: matplotlib is not installed.
    """
    read = _read(runs)
    layer = layer or _common_layers(read)[0]
    _check_layer(read, layer)
    figure = new_figure(10, 6.5, layout="constrained")
    figure.suptitle(layer, fontsize=12, fontweight="bold")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for axes, (quantity, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items()):
        _draw(axes, read, layer, quantity, labels)
        axes.set_title(title, fontsize=11)
    for axes in figure.axes[2:]:
        axes.set_xlabel("iteration")
    for axes in figure.axes[::2]:
        axes.set_ylabel("ℓ2 norm over the channels")
    _add_legend(figure, read)
    save(figure, picture)
    return layer


def plot_all_layers(runs: Sequence[str], picture: str, labels: Sequence[str] = ()) -> int:
    """
    Draws a sheet of small multiples: a row for each norm over the depth, a column for each statistic.

    Args, Raises:
        as :func:`plot_statistics`.

    Returns:
        the number of layers.
    """
    read = _read(runs)
    layers = _common_layers(read)
    figure = new_figure(11, 1 + 1.15 * len(layers), layout="constrained")
    grid = figure.subplots(len(layers), len(PANELS), sharex=True, squeeze=False)
    for row, layer in zip(grid, layers):
        for axes, quantity in zip(row, PANELS):
            _draw(axes, read, layer, quantity, labels)
            axes.tick_params(labelsize=7)
        row[0].set_ylabel(_shortened(layer), fontsize=7, rotation=0, ha="right", va="center")
    for axes, title in zip(grid[0], PANELS.values()):
        axes.set_title(title, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("iteration", fontsize=8)
    _add_legend(figure, read)
    save(figure, picture)
    return len(layers)


def swing(values: np.ndarray) -> float:
    """
    The relative standard deviation from iteration to iteration, free of slow changes.

    That of the changes of the logarithm, divided by √2.
    """
    changes = np.diff(np.log(values[values > 0]))
    return float(np.std(changes) / np.sqrt(2)) if len(changes) > 1 else np.nan


def swing_table(runs: Sequence[str], layer: str | None = None, labels: Sequence[str] = ()) -> str:
    """
    The :func:`swing` of each statistic, the median over the layers that all runs have, in Markdown.

    Args, Raises:
        as :func:`plot_statistics`, but that a layer is one of many if it is None.
    """
    read = _read(runs)
    layers = [layer] if layer else _common_layers(read)
    quantities = [*PANELS, *AVERAGES.values()]
    rows = [["swing", *quantities], ["---"] * (1 + len(quantities))]
    for metrics, label in zip(read.values(), _labels(read, labels)):
        row = [label]
        for quantity in quantities:
            swings = [swing(series(metrics, f"statistics/{x}/{quantity}")[1]) for x in layers]
            finite = [value for value in swings if np.isfinite(value)]
            row.append(f"{np.median(finite):.3f}" if finite else "-")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _labels(read: dict[str, Metrics], labels: Sequence[str]) -> Sequence[str]:
    return labels or [os.path.basename(os.path.normpath(run)) for run in read]


def _read(runs: Sequence[str]) -> dict[str, Metrics]:
    read = {}
    for run in runs:
        metrics = read_metrics(os.path.join(run, METRICS))
        if not recorded_layers(metrics):
            raise ValueError(f"{run} has no statistics: train with STATISTICS.ENABLED True")
        read[run] = metrics
    return read


def _common_layers(read: dict[str, Metrics]) -> list[str]:
    first, *others = (recorded_layers(metrics) for metrics in read.values())
    common = [layer for layer in first if all(layer in other for other in others)]
    if not common:
        raise ValueError(f"{', '.join(read)} have no layer in common")
    return common


def _check_layer(read: dict[str, Metrics], layer: str) -> None:
    for run, metrics in read.items():
        layers = recorded_layers(metrics)
        if layer not in layers:
            raise ValueError(f"--layer: {run} has no {layer!r}, it has {', '.join(layers)}")


def _draw(axes, read: dict[str, Metrics], layer: str, quantity: str, labels: Sequence[str]) -> None:
    for number, (metrics, label) in enumerate(zip(read.values(), _labels(read, labels))):
        style = _STYLES[number // len(LINE_COLOURS) % len(_STYLES)]
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        iterations, values = series(metrics, f"statistics/{layer}/{quantity}")
        axes.plot(iterations, values, style, color=colour, linewidth=1, label=label)
        iterations, values = series(metrics, f"statistics/{layer}/{AVERAGES.get(quantity)}")
        if len(iterations):
            axes.plot(iterations, values, style, color=_AVERAGE_COLOUR, linewidth=1.4)
    positive = [y for line in axes.lines for y in line.get_ydata() if y > 0]
    if positive and max(positive) > 30 * np.median(positive):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:.3g}")  # a common factor would stand in the title
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY)


def _add_legend(figure, read: dict[str, Metrics]) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    averaged = [
        line for axes in figure.axes for line in axes.lines if line.get_color() == _AVERAGE_COLOUR
    ]
    if averaged:
        handles, names = (
            [*handles, averaged[0]],
            [*names, r"what MABN uses: $\bar\chi^2$, $\bar\psi$"],
        )
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)


def _shortened(layer: str) -> str:
    return layer if len(layer) <= 34 else f"…{layer[-33:]}"
