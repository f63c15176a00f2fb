"""Measurements as a table, a summary and a CSV file."""

import csv
import math
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .measure import IDEAL_PASSES, Row

PAIRS = [  # whose ratios the summary has
    ("MABN", "BN"),
    ("MBN", "BN"),
    ("BRN", "BN"),
    ("GN", "BN"),
    ("SyncBN", "BN"),
    ("reference", "BN"),
    ("reference", "MABN"),
]


def ratio(row: Row, other: Row) -> float:
    """How many times longer `row` takes than `other`: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(row.times, other.times))


HEADER = (
    f"{'shape':<16}{'N x C x H x W':<18}{'norms':>5}  {'norm':<10}{'median ms':>10}"
    f"{'p10':>9}{'p90':>9}{'/BN':>7}{'%copy':>7}{'peak MiB':>10}{'peak/x':>8}{'saved':>16}"
)


def format_row(row: Row, bn: Row | None, bandwidth: float) -> str:
    """A line of the table; `bandwidth` is the device's, in bytes per millisecond."""
    low, high = np.percentile(row.times, [10, 90])
    size = "x".join(map(str, row.shape.size))
    share = IDEAL_PASSES * row.x_bytes / row.median / bandwidth
    to_bn = ratio(row, bn) if bn else math.nan
    beyond_x = (row.saved_bytes - row.x_bytes) / 2**10
    saved = f"x {beyond_x:+.1f} KiB"
    return (
        f"{row.shape.name:<16}{size:<18}{row.shape.norms:>5}  {row.norm:<10}{row.median:>10.3f}"
        f"{low:>9.3f}{high:>9.3f}{to_bn:>7.2f}{100 * share:>7.0f}"
        f"{row.peak_bytes / 2**20:>10.2f}{row.peak_bytes / row.x_bytes:>8.2f}{saved:>16}"
    )


def summarize(rows: list[Row]) -> str:
    """The ratios over all shapes, and the time of all norms of a training step."""
    table = {(row.norm, row.shape): row for row in rows}
    lines = [f"{'':<18}{'geometric mean':>15}{'of step time':>14}"]
    in_groups = [(row.norm, row.norm.split("(")[0]) for row in rows if "(" in row.norm]
    for name, other in [*PAIRS, *dict.fromkeys(in_groups)]:
        shapes = [row.shape for row in rows if row.norm == name and (other, row.shape) in table]
        if not shapes:
            continue
        pairs = [(table[name, shape], table[other, shape]) for shape in shapes]
        mean = statistics.geometric_mean(ratio(a, b) for a, b in pairs)
        weighted = step_time(a for a, _ in pairs) / step_time(b for _, b in pairs)
        lines.append(f"{name + ' / ' + other:<18}{mean:>15.3f}{weighted:>14.3f}")
    count = sum(shape.norms for shape in {row.shape for row in rows})
    lines.append(f"\nstep time of these {count} norms, forward and backward, in ms:")
    for name in dict.fromkeys(row.norm for row in rows):
        total = step_time(row for row in rows if row.norm == name)
        lines.append(f"{name:<18}{total:>15.1f}")
    return "\n".join(lines)


def step_time(rows: Iterator[Row]) -> float:
    """Milliseconds of all norms that have these shapes."""
    return sum(row.shape.norms * row.median for row in rows)


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes the measurements. An interruption leaves no half-written file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["shape", "n", "c", "h", "w", "norms", "norm", "median_ms", "p10_ms", "p90_ms"]
                + ["x_bytes", "peak_bytes", "saved_bytes"]
            )
            for row in rows:
                times = [row.median, *np.percentile(row.times, [10, 90])]
                writer.writerow(
                    [row.shape.name, *row.shape.size, row.shape.norms, row.norm]
                    + [f"{value:.6f}" for value in times]
                    + [row.x_bytes, row.peak_bytes, row.saved_bytes]
                )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
