"""Stage `inference`: ResNet-50 with each norm, MABN and BN also folded into the convolutions."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import Bottleneck

from ...layers import MABN2d
from ...surgery import centralize, fold
from ..measure import DTYPES, Settings, time_once
from .stage import Case, Options, Stage

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "MABN": MABN2d,
    "IN": functools.partial(nn.InstanceNorm2d, affine=True),
    "GN": functools.partial(nn.GroupNorm, 32),
    "LN": functools.partial(nn.GroupNorm, 1),  # over all channels and positions
}
FOLDED = " folded"


def cases(options: Options) -> list[Case]:
    names = [f"MABN{FOLDED}", f"BN{FOLDED}", *NORMS]
    batches = (1, 2) if options.tiny else (1, 32)
    return [
        {"batch": str(batch), "dtype": dtype, "norm": norm}
        for dtype, batch, norm in itertools.product(("float32", "float16"), batches, names)
    ]


def build(name: str, tiny: bool) -> nn.Module:
    """The model in evaluation, on the CPU."""
    norm = NORMS[name.removesuffix(FOLDED)]
    model = (resnet18 if tiny else resnet50)(norm_layer=norm)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.2)  # else half precision overflows
    if norm is MABN2d:
        centralize(model)
    model.eval()
    return fold(model) if name.endswith(FOLDED) else model


@torch.inference_mode()
def measure(case: Case, options: Options) -> Iterator[dict]:
    torch.manual_seed(0)
    dtype, batch = DTYPES[case["dtype"]], int(case["batch"])
    model = build(case["norm"], options.tiny).to("cuda", dtype)
    side, runs, warmup = (64, 2, 1) if options.tiny else (224, 100, 20)
    images = torch.randn(batch, 3, side, side, device="cuda", dtype=dtype)
    settings = Settings(torch.device("cuda"), dtype)
    times = [time_once(lambda: model(images), settings) for _ in range(warmup + runs)][warmup:]
    low, high = np.percentile(times, [10, 90])
    yield {
        "iterations_per_s": 1000 / statistics.median(times),
        "median_ms": statistics.median(times),
        "p10_ms": float(low),
        "p90_ms": float(high),
    }


STAGE = Stage(
    "inference",
    "inference.csv",
    ("batch", "dtype", "norm"),
    ("iterations_per_s", "median_ms", "p10_ms", "p90_ms"),
    cases,
    measure,
)
