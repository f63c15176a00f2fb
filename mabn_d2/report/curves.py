"""Curves of losses and AP over the iterations of a run."""

import os

import numpy as np

from .canvas import GREY, new_figure, save
from .metrics import evaluated, read_metrics, series
from .run import count, describe_model, read_config


def smooth(values: np.ndarray) -> np.ndarray:
    """
    Bell-shaped means over a twentieth of the points to either side.

    NaN values stay NaN and do not count; less than 20 points stay as they are.
    """
    reach = len(values) // 20
    if not reach:
        return values
    weights = np.exp(-2 * (np.arange(-reach, reach + 1) / reach) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), weights, "same")
    count = np.convolve(known.astype(float), weights, "same")
    return np.where(known, total / np.maximum(count, weights[reach]), np.nan)


def plot_curves(metrics_file: str, picture: str) -> None:
    """
    Draws losses and AP over the iterations.

    Args:
        metrics_file: `metrics.json` of a run; the title comes from the `config.yaml` beside it.
        picture: PNG file to write.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: there are no losses or no evaluation in the file.
        ImportError: matplotlib is not installed.
    """
    metrics = read_metrics(metrics_file)
    tasks = evaluated(metrics, metrics_file)
    components = sorted({k for values in metrics.values() for k in values if k.startswith("loss_")})
    if not any("total_loss" in values for values in metrics.values()):
        raise ValueError(f"{metrics_file} holds no losses")
    cfg = read_config(os.path.dirname(metrics_file))

    figure = new_figure(10, 7.5, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(describe_model(cfg), fontsize=13, fontweight="bold")
    _plot_losses(top, {key: series(metrics, key) for key in ("total_loss", *components)})
    _plot_ap(bottom, {name: series(metrics, f"{task}/AP") for task, name in tasks.items()})
    bottom.set_xlabel(f"iteration ({count(cfg.SOLVER.IMS_PER_BATCH, 'image')} each)")
    bottom.set_xlim(left=0)
    for axes in (top, bottom):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    save(figure, picture)


def _plot_losses(axes, losses: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    is_smoothed = False
    for number, (name, (iterations, values)) in enumerate(losses.items()):
        style = {"color": f"C{number - 1}", "linewidth": 1.4}
        if name == "total_loss":
            style = {"color": "black", "linewidth": 2.2}
        smoothed = smooth(values)
        if not np.array_equal(smoothed, values, equal_nan=True):
            axes.plot(iterations, values, **{**style, "linewidth": 0.8, "alpha": 0.3})
            is_smoothed = True
        axes.plot(iterations, smoothed, label=name, **style)
    if is_smoothed:
        axes.plot([], [], color=GREY, linewidth=0.8, alpha=0.5, label="not smoothed")
    finite = np.concatenate([values[np.isfinite(values)] for _, values in losses.values()])
    if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("training loss (log scale)")
    else:
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=min(0, finite.min(initial=0)))


def _plot_ap(axes, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for number, (name, (iterations, values)) in enumerate(curves.items()):
        last = "-" if np.isnan(values[-1]) else f"{values[-1]:.1f} %"
        label, marker = f"{name} AP, last {last}", "osD^v"[number % 5]
        # Markers at the frame would be cut in half.
        axes.plot(iterations, values, label=label, marker=marker, linewidth=1.8, clip_on=False)
    axes.set_ylabel("validation AP (%)")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
