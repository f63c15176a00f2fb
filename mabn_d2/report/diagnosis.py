"""The noise of batch statistics over the depth of a model."""

from ..statistics import Advice, Diagnosis
from ..statistics.diagnosis import QUANTITIES
from .canvas import GREY, new_figure, save
from .statistics import LINE_COLOURS

_LABELS = {
    "mean": r"$\mu_B$, in $\sigma$",
    "var": r"$\sigma^2_B$, in $\sigma^2$",
    "grad_mean": r"$g_B$, in rms of $\partial L/\partial Y$",
    "grad_dot": r"$\Psi_B$, in rms of $\partial L/\partial Y$",
}
_MARKERS = dict(zip(QUANTITIES, "os^D"))


def plot_diagnosis(diagnosis: Diagnosis, advice: Advice, picture: str) -> None:
    """
    Draws the noise of the four statistics of each layer, its share from between images, and the difference
    between training and evaluation.

    Args:
        picture: .png or .svg file to write.

    Raises:
        ValueError: the file's type is unknown.
        ImportError: matplotlib is not installed.
    """
    layers = diagnosis.layers
    figure = new_figure(max(8, 3 + 0.2 * len(layers)), 9, layout="constrained")
    noise, share, difference = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.6, 1.4]}
    )
    positions = range(len(layers))
    for number, quantity in enumerate(QUANTITIES):
        style = dict(
            color=LINE_COLOURS[number], marker=_MARKERS[quantity], markersize=4, linewidth=0.8
        )
        noise.errorbar(
            positions, [layer.noise[quantity] for layer in layers],
            [2 * layer.standard_error[quantity] for layer in layers],
            label=_LABELS[quantity], **style,
        )  # fmt: skip
        share.plot(positions, [100 * layer.between[quantity] for layer in layers], **style)
    size = diagnosis.norm_batch
    noise.set_title(f"Noise of statistics over {size} image{'s' * (size != 1)}", fontsize=11)
    noise.set_yscale("log")
    noise.set_ylabel("root mean square error\n(bars: 2 standard errors)")
    share.set_title("Of its square, from between images", fontsize=11)
    share.set_ylabel("%")
    share.set_ylim(-4, 104)
    style = dict(color="black", marker="o", markersize=4, linewidth=0.8)
    difference.plot(positions, [layer.train_eval for layer in layers], **style)
    difference.set_title("Outputs of training less those of evaluation", fontsize=11)
    difference.set_ylabel("rms, relative to\nthe output's")
    difference.set_ylim(bottom=0)
    difference.set_xticks(
        positions, [_name(layer.layer) for layer in layers], rotation=90, fontsize=7
    )
    for axes in (noise, share, difference):
        axes.grid(color="0.92", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    noise.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    text = f"noise {advice.noise:.3f}, between images {advice.between:.3f}"
    figure.suptitle(f"{advice.sentence.partition(':')[0]}: {text}", fontsize=12, fontweight="bold")
    save(figure, picture)


def _name(layer: str) -> str:
    for prefix in ("backbone.", "bottom_up.", "roi_heads."):
        layer = layer.removeprefix(prefix)
    return layer.removesuffix(".norm")
