"""The results as a Markdown report."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...utils.files import atomic_write
from ...utils.results import Results
from .stage import Device

Rows = list[dict[str, str]]


def write_report(
    path: Path, results: dict[str, Results], device: Device, tiny: bool = False
) -> None:
    """
    Args:
        path: of the report, which is whole at each moment.
        results: by the name of the CSV file, in the order of the report.
        tiny: whether the sizes are not those that the report names.
    """
    lines = [
        "# The norms on a GPU",
        "",
        f"{device.device}, driver {device.driver}, PyTorch {device.torch}.",
    ]
    if device.device == "Dry GPU":
        lines += ["", "**A rehearsal without a GPU: no time and no number below is a GPU's.**"]
    if tiny:
        lines += ["", "**With small sizes, to see that everything runs; not those named below.**"]
    for file, result in results.items():
        if not result.rows:
            continue
        dates = sorted({row["date"] for row in result.rows})
        lines += ["", f"## {file.removesuffix('.csv').capitalize()}", ""]
        lines += [f"{', '.join(dates)}; raw numbers in [{file}]({file}).", ""]
        measured = [row for row in result.rows if not row["error"]]
        lines += _SECTIONS[file](measured) if measured else []
        failed = [row for row in result.rows if row["error"]]
        if failed:
            columns = [*result.keys, "error"]
            lines += [
                "",
                "Failed:",
                "",
                *table(columns, ([row[c] for c in columns] for row in failed)),
            ]
    with atomic_write(str(path), "w") as report:
        report.write("\n".join(lines) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _correct(rows: Rows) -> list[str]:
    header = ["check", "norm", "dtype", "triton", "ok", "largest error", "tolerance"]
    lines = []
    for key, group in _groups(rows, "check", "norm", "dtype", "triton"):
        errors = [float(row[c]) for row in group for c in row if c.endswith("_error") and row[c]]
        fine = sum(row["ok"] == "yes" for row in group)
        largest = f"{max(errors):.1e}" if errors else ""
        lines.append([*key, f"{fine} of {len(group)}", largest, group[0]["tolerance"]])
    wrong = [row for row in rows if row["ok"] != "yes"]
    columns = ["check", "norm", "dtype", "triton", "layout", "extent"]
    columns += ["output_error", "gradient_error", "state_error", "tolerance"]
    out = [
        f"{len(rows) - len(wrong)} of {len(rows)} rows are within their tolerance. Errors are relative to "
        "the largest value of a tensor, or to 1.",
        "",
        *table(header, lines),
    ]
    if wrong:
        out += ["", "Beyond:", "", *table(columns, ([row[c] for c in columns] for row in wrong))]
    return out


def _layers(rows: Rows) -> list[str]:
    header = ["dtype", "layout", "triton", "norm", "norms", "ms", "/ BN", "kernels, ms", "/ BN"]
    header += ["share of copy", "peak / BN"]
    lines = []
    for key, group in _groups(rows, "dtype", "layout", "triton"):
        bn = {row["shape"]: row for row in group if row["norm"] == "BN"}
        for (norm,), own in _groups(group, "norm"):
            own = [row for row in own if row["shape"] in bn]
            if not own:
                continue
            other = [bn[row["shape"]] for row in own]
            ms, kernels = (_step(own, column) for column in ("median_ms", "kernels_ms"))
            share = sum(
                int(r["norms"]) * float(r["copy_share"]) * float(r["kernels_ms"]) for r in own
            )
            peak = _step(own, "peak_bytes") / _step(other, "peak_bytes")
            lines.append(
                [*key, norm, str(sum(int(row["norms"]) for row in own)), f"{ms:.3f}"]
                + [f"{ms / _step(other, 'median_ms'):.2f}", f"{kernels:.3f}"]
                + [f"{kernels / _step(other, 'kernels_ms'):.2f}", f"{100 * share / kernels:.0f} %"]
                + [f"{peak:.2f}"]
            )
    return [
        "Forward and backward of all norms of a step of Mask R-CNN R50-FPN with two images of 800x1333; with "
        "launches, and the kernels alone. The share of the copy bandwidth is that of the kernels.",
        "",
        *table(header, lines),
    ]


def _step(rows: Rows, column: str) -> float:
    """The sum over all norms that have the shapes of the rows."""
    return sum(int(row["norms"]) * float(row[column]) for row in rows)


def _training(rows: Rows) -> list[str]:
    header = [
        "norm",
        "AMP",
        "ms per iteration",
        "p10",
        "p90",
        "/ BN",
        "allocated GiB",
        "reserved GiB",
    ]
    bn = {row["amp"]: float(row["median_ms"]) for row in rows if row["norm"] == "BN"}
    lines = []
    for row in sorted(rows, key=lambda row: row["amp"]):
        ratio = f"{float(row['median_ms']) / bn[row['amp']]:.3f}" if row["amp"] in bn else ""
        memory = [f"{int(row[f'{kind}_bytes']) / 2**30:.2f}" for kind in ("allocated", "reserved")]
        times = [f"{float(row[column]):.1f}" for column in ("median_ms", "p10_ms", "p90_ms")]
        lines.append([row["norm"], row["amp"], *times, ratio, *memory])
    images, steps = rows[0]["images"], rows[0]["steps"]
    return [
        f"Mask R-CNN, {images} images per step; {steps} iterations are timed. MBN's contains "
        "Double-Forward.",
        "",
        *table(header, lines),
    ]


def _inference(rows: Rows) -> list[str]:
    header = ["batch", "dtype", "network", "ms", "iterations / s", "time / BN folded"]
    lines = []
    for _, group in _groups(rows, "batch", "dtype"):
        times = {row["network"]: float(row["median_ms"]) for row in group}
        lines += [
            [row["batch"], row["dtype"], row["network"], f"{times[row['network']]:.3f}"]
            + [f"{float(row['iterations_per_s']):.1f}"]
            + [f"{times[row['network']] / times['BN folded']:.3f}"]
            for row in group
        ]
    return ["ResNet-50 on images of 224x224.", "", *table(header, lines)]


def _accuracy(rows: Rows) -> list[str]:
    header = ["norm", "images per step", "iterations", "seed", "box AP", "mask AP", "seconds"]
    lines = [
        [row["norm"], row["images"], row["iterations"], row["seed"]]
        + [f"{float(row[column]):.1f}" for column in ("box_ap", "mask_ap", "seconds")]
        for row in rows
    ]
    return [
        "The demo's Mask R-CNN from scratch on the generated images, with its schedule scaled to the "
        "number of iterations; one learning rate for all.",
        "",
        *table(header, lines),
    ]


_SECTIONS: dict[str, Callable[[Rows], list[str]]] = {
    "correct.csv": _correct,
    "layers.csv": _layers,
    "training.csv": _training,
    "inference.csv": _inference,
    "accuracy.csv": _accuracy,
}


def _groups(rows: Rows, *columns: str) -> Iterable[tuple[tuple[str, ...], Rows]]:
    """Rows that agree in the columns, in the order in which they first appear."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups.items()
