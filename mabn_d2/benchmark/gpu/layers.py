"""Stage `layers`: a forward and backward pass of each norm on the inputs of Mask R-CNN R50-FPN."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from ..measure import (
    DTYPES,
    IDEAL_PASSES,
    MEMORY_FORMATS,
    Settings,
    copy_bandwidth,
    make_norms,
)
from ..measure import measure as measure_norms
from ..shapes import SHAPES, Shape
from .correct import triton, triton_switches
from .stage import Case, Options, Stage

# Those that the package's kernels in Triton make faster, and what they are compared with.
WITH_TRITON = ("BN", "MABN")


def shapes(options: Options) -> list[Shape]:
    return [Shape("tiny", (2, 64, 8, 8), 1)] if options.tiny else SHAPES


def cases(options: Options) -> list[Case]:
    conditions = itertools.product(
        ("float32", "float16"), MEMORY_FORMATS, triton_switches(), shapes(options)
    )
    return [
        {"dtype": dtype, "layout": layout, "triton": switch, "shape": shape.name}
        for dtype, layout, switch, shape in conditions
    ]


def measure(case: Case, options: Options) -> Iterator[dict]:
    (shape,) = (shape for shape in shapes(options) if shape.name == case["shape"])
    device = torch.device("cuda")
    runs = 2 if options.tiny else 20
    settings = Settings(device, DTYPES[case["dtype"]], MEMORY_FORMATS[case["layout"]], runs)
    norms = make_norms(device, options.release)
    if case["triton"] == "off" and len(triton_switches()) > 1:
        norms = {name: norms[name] for name in WITH_TRITON}
    join_world_of_one("gloo" if options.tiny else "nccl")  # the dry GPU has no NCCL
    with triton(case["triton"]):
        bandwidth = copy_bandwidth(shapes(options), settings)
        rows = measure_norms(shape, norms, settings)
        queued = measure_norms(shape, norms, settings._replace(queued=True))
    kernels = {row.norm: row.median for row in queued}
    for row in rows:
        low, high = np.percentile(row.times, [10, 90])
        yield {
            "norm": row.norm,
            "norms": shape.norms,
            "size": "x".join(map(str, shape.size)),
            "median_ms": row.median,
            "p10_ms": float(low),
            "p90_ms": float(high),
            "kernels_ms": kernels[row.norm],
            "copy_share": IDEAL_PASSES * row.x_bytes / kernels[row.norm] / bandwidth,
            "copy_gb_per_s": bandwidth / 1e6,
            "x_bytes": row.x_bytes,
            "peak_bytes": row.peak_bytes,
            "saved_bytes": row.saved_bytes,
        }


def join_world_of_one(backend: str) -> None:
    """The process group that SyncBN needs. It lasts as long as the process."""
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


STAGE = Stage(
    "layers",
    "layers.csv",
    ("dtype", "layout", "triton", "shape"),
    (
        "norm", "norms", "size", "median_ms", "p10_ms", "p90_ms", "kernels_ms", "copy_share",
        "copy_gb_per_s", "x_bytes", "peak_bytes", "saved_bytes",
    ),
    cases,
    measure,
)  # fmt: skip
