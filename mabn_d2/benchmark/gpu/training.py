"""Stage `training`: a training step of Mask R-CNN R50-FPN on two images of 800x1333 pixels."""

import itertools
import statistics
from collections.abc import Iterator

import numpy as np

from ..training import CONFIGS, measure_step
from .stage import Case, Options, Stage

IMAGES = 2
# First those that have to be compared.
GROUPS = [("FrozenBN", "BN", "GN", "MABN"), ("BRN", "MBN")]
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def cases(options: Options) -> list[Case]:
    groups = [("FrozenBN", "MABN")] if options.tiny else GROUPS
    return [
        {"norm": norm, "amp": amp}
        for norms in groups
        for amp, norm in itertools.product(("off", "on"), norms)
    ]


def measure(case: Case, options: Options) -> Iterator[dict]:
    norm, amp = case["norm"], case["amp"] == "on"
    if options.tiny:
        path = "quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
        overrides = [item for key in NORM_KEYS for item in (f"MODEL.{key}.NORM", norm)]
        length = {"size": (64, 128), "steps": 2, "warmup": 1}
    else:
        path = f"COCO-InstanceSegmentation/{CONFIGS[norm]}"
        overrides = []
        length = {"steps": 40, "warmup": 20}  # past the length of MABN's buffers
    cost = measure_step(options.root / "configs" / path, amp, IMAGES, overrides=overrides, **length)
    low, high = np.percentile(cost.times, [10, 90])
    yield {
        "images": IMAGES,
        "steps": len(cost.times),
        "median_ms": statistics.median(cost.times),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "allocated_bytes": cost.allocated,
        "reserved_bytes": cost.reserved,
    }


STAGE = Stage(
    "training",
    "training.csv",
    ("norm", "amp"),
    ("images", "steps", "median_ms", "p10_ms", "p90_ms", "allocated_bytes", "reserved_bytes"),
    cases,
    measure,
)
