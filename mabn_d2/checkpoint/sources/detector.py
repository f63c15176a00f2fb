"""What detectors of maskrcnn-benchmark and torchvision have in common."""

import re
from typing import Any

from .weights import StateDict


def move_background_last(state_dict: StateDict) -> None:
    """
    The class order of maskrcnn-benchmark and torchvision -> that of Detectron2, in place.

    Of `1 + K` classes the background is the first there, in scores, boxes and masks. Detectron2
    has it last in the scores and nowhere else. Class-agnostic boxes are those of "class" 1 of 2.
    """
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head.predictor."
    for tensor in ("weight", "bias"):
        scores = state_dict.get(f"{box}cls_score.{tensor}")
        if scores is not None:
            state_dict[f"{box}cls_score.{tensor}"] = scores.roll(-1, 0)
        for name, per_class in ((f"{box}bbox_pred.{tensor}", 4), (mask + tensor, 1)):
            if name in state_dict:
                state_dict[name] = state_dict[name][per_class:].clone()


def heads_config(state_dict: StateDict) -> dict[str, Any]:
    """Options of what follows a detector's backbone."""

    def norm(prefix: str) -> str:
        keys = [key for key in state_dict if key.startswith(prefix) and ".norm." in key]
        return "MABN" if any("psi" in key for key in keys) else "BN" if keys else ""

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, key) is not None for key in state_dict)

    box, mask = "roi_heads.box_head.", "roi_heads.mask_head."
    pooler = {"POOLER_TYPE": "ROIAlign", "POOLER_SAMPLING_RATIO": 2}
    options = {
        "FPN": {"NORM": norm("backbone.fpn_")},
        "ANCHOR_GENERATOR": {"OFFSET": 0.5},
        "ROI_BOX_HEAD": {
            "NORM": norm(box),
            "NUM_CONV": count(re.escape(box) + r"conv\d+\.weight"),
            "NUM_FC": count(re.escape(box) + r"fc\d+\.weight"),
            **pooler,
        },
    }
    if "roi_heads.box_predictor.cls_score.weight" in state_dict:
        classes = len(state_dict["roi_heads.box_predictor.cls_score.weight"]) - 1
        options["ROI_HEADS"] = {"NUM_CLASSES": classes}
    if count(re.escape(mask) + ".+"):
        convolutions = count(re.escape(mask) + r"mask_fcn\d+\.weight")
        options["ROI_MASK_HEAD"] = {"NORM": norm(mask), "NUM_CONV": convolutions, **pooler}
    return {**options, "MASK_ON": "ROI_MASK_HEAD" in options}
