"""Figures of a study's results."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..report.canvas import new_figure, save
from .measure import read_pairs
from .plan import Block, Plan, Run
from .tables import NAMES, Cells, Mean, Rows, by_seed, mean

# Told apart by colour-blind eyes (Okabe and Ito 2008, https://jfly.uni-koeln.de/color/), and by markers.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
MARKERS = "osD^vPX*"
Curves = dict[str, list[dict[str, str]]]  # by run


def _style(plan: Plan, norm: str) -> dict:
    """The same for a norm in all figures."""
    number = plan.norms.index(norm)
    lines = ("-", "--", ":", "-.")
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": lines[number // len(COLOURS) % len(lines)],
    }


def _axes(count: int, ylabel: str, norms: int):
    height = max(4.2, 0.7 + 0.21 * norms)  # of the legend
    figure = new_figure(5.2 * count + 1.8, height, layout="constrained")
    row = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    row[0].set_ylabel(ylabel)
    for axes in row:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def _finish(figure, axes, picture: Path) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    picture.parent.mkdir(parents=True, exist_ok=True)
    save(figure, str(picture))


def plot_curves(plan: Plan, block: Block, rows: Rows, curves: Curves, picture: Path) -> None:
    """The result over the iterations: mean over the seeds, and one standard error to either side."""
    cells, metric = Cells(block), block.tool.metrics[0]
    figure, row = _axes(len(cells.columns), NAMES[metric], len(cells.norms))
    for axes, column in zip(row, cells.columns):
        axes.set_title(cells.heading(column))
        axes.set_xlabel("iteration")
        for norm in cells.norms:
            points: dict[int, list[float]] = {}
            for run in cells.runs(norm, column):
                source = rows.get(run.id, {}).get("copy_of") or run.id
                for point in curves.get(source, []):
                    points.setdefault(int(point["iteration"]), []).append(float(point[metric]))
            _band(axes, {x: mean(values) for x, values in points.items()}, norm, _style(plan, norm))
    _finish(figure, row[-1], picture)


def _band(axes, points: dict[int, Mean], label: str, style: dict) -> None:
    if not points:
        return
    x = sorted(points)
    y = np.array([points[i].mean for i in x])
    error = np.nan_to_num([points[i].error for i in x])
    axes.plot(x, y, label=label, markersize=4, **style)
    axes.fill_between(x, y - error, y + error, color=style["color"], alpha=0.2, linewidth=0)


def plot_norm_batch(plan: Plan, block: Block, rows: Rows, _: Curves, picture: Path) -> None:
    """The result against the images that a norm takes its statistics from."""
    metric = block.tool.metrics[0]
    norms = list(dict.fromkeys(run.norm for run in block.runs))
    sizes = sorted({run.norm_batch for run in block.runs})
    groups = list(dict.fromkeys((run.level, run.lr) for run in block.runs))
    figure, row = _axes(len(groups), NAMES[metric], len(norms))
    for axes, (level, lr) in zip(row, groups):
        for norm in norms:
            points = {}
            for size in sizes:
                key = norm, size, level, lr
                runs = [r for r in block.runs if (r.norm, r.norm_batch, r.level, r.lr) == key]
                if values := by_seed(runs, rows, metric):
                    points[size] = mean(list(values.values()))
            if points:
                errors = np.nan_to_num([point.error for point in points.values()])
                means = [point.mean for point in points.values()]
                style = _style(plan, norm)
                axes.errorbar(list(points), means, errors, label=norm, capsize=3, **style)
        if len(groups) > 1:
            rate = "" if lr is None else f"LR {lr:g}"
            axes.set_title(", ".join(filter(None, [level, rate])))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xlabel("images per normalization batch")
    _finish(figure, row[-1], picture)


def plot_looks(plan: Plan, block: Block, rows: Rows, _: Curves, picture: Path) -> None:
    """Box AP by the look of the images."""
    _plot_parts(plan, block, rows, picture, "box AP", lambda row: read_pairs(row["ap_by_look"]))


def plot_train_test(plan: Plan, block: Block, rows: Rows, _: Curves, picture: Path) -> None:
    """The result on the validation data, and on the other data sets that were evaluated."""
    metric = block.tool.metrics[0]

    def parts(row: dict[str, str]) -> dict[str, float]:
        return {"validation": float(row[metric]), **read_pairs(row["other_aps"])}

    _plot_parts(plan, block, rows, picture, NAMES[metric], parts)


def _plot_parts(
    plan: Plan, block: Block, rows: Rows, picture: Path, label: str, parts: Callable
) -> None:
    cells = Cells(block)
    figure, row = _axes(len(cells.columns), label, len(cells.norms))
    for axes, column in zip(row, cells.columns):
        axes.set_title(cells.heading(column))
        found = {norm: _parts(cells.runs(norm, column), rows, parts) for norm in cells.norms}
        names = list(dict.fromkeys(name for means in found.values() for name in means))
        for number, (norm, means) in enumerate(found.items()):
            there = [i for i, name in enumerate(names) if name in means]
            if there:
                shift = (number - (len(found) - 1) / 2) * 0.6 / len(found)
                values = [means[names[i]] for i in there]
                style = {**_style(plan, norm), "linestyle": "none"}
                axes.errorbar(
                    [i + shift for i in there], [v.mean for v in values],
                    np.nan_to_num([v.error for v in values]), label=norm, capsize=2, **style,
                )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
    _finish(figure, row[-1], picture)


def _parts(runs: Sequence[Run], rows: Rows, parts: Callable) -> dict[str, Mean]:
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.id in rows and not rows[run.id]["error"]:
            for name, value in parts(rows[run.id]).items():
                values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


FIGURES = {
    "curves": plot_curves,
    "norm_batch": plot_norm_batch,
    "looks": plot_looks,
    "train_test": plot_train_test,
}
