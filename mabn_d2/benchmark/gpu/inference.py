"""Stage `inference`: ResNet-50 with each norm, MABN and BN also folded into the convolutions."""

import itertools
import statistics
from collections.abc import Iterator

import numpy as np
import torch

from ..inference import benchmark_inference, make_networks
from ..measure import DTYPES
from .stage import Case, Options, Stage


def cases(options: Options) -> list[Case]:
    batches = (1,) if options.tiny else (1, 32)
    return [
        {"batch": str(batch), "dtype": dtype}
        for dtype, batch in itertools.product(("float32", "float16"), batches)
    ]


def measure(case: Case, options: Options) -> Iterator[dict]:
    dtype, batch = DTYPES[case["dtype"]], int(case["batch"])
    side, rounds = (64, 2) if options.tiny else (224, 100)
    networks = {name: network.to(dtype) for name, network in make_networks().items()}
    images = torch.randn(batch, 3, side, side, device="cuda", dtype=dtype)
    for result in benchmark_inference(networks, images, rounds, images.device):
        low, high = np.percentile(result.times, [10, 90])
        yield {
            "network": result.name,
            "iterations_per_s": result.per_second,
            "median_ms": 1000 * statistics.median(result.times),
            "p10_ms": 1000 * float(low),
            "p90_ms": 1000 * float(high),
        }


STAGE = Stage(
    "inference",
    "inference.csv",
    ("batch", "dtype"),
    ("network", "iterations_per_s", "median_ms", "p10_ms", "p90_ms"),
    cases,
    measure,
)
