"""Weights of torchvision's ResNets, and of its Faster and Mask R-CNN with such a backbone."""

import re
from collections.abc import Callable
from typing import Any

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .detector import heads_config, move_background_last
from .resnet import is_resnet, resnet_config, resnet_name
from .weights import (
    FOREIGN_NORM_NOTE,
    StateDict,
    Weights,
    check_all_known,
    found,
    merge,
    pixels,
    rename,
    split,
)

_SOURCE = "torchvision's ResNets, Faster and Mask R-CNN"
_ACCEPTED = (
    "conv1.weight, bn1.weight, layer1.0.conv1.weight, ..., fc.bias, and detectors with FPN whose heads have no "
    "norm (backbone.body.conv1.weight, backbone.fpn.inner_blocks.0.weight, ...)"
)
# Names of its detectors, before 0.14 and since -> Detectron2's. Numbers count from the first stage.
_DETECTOR_MODULES: list[tuple[str, Callable[..., str]]] = [
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?", lambda n: f"backbone.fpn_lateral{int(n) + 2}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?", lambda n: f"backbone.fpn_output{int(n) + 2}"),
    (r"rpn\.head\.conv(?:\.0\.0)?", lambda: "proposal_generator.rpn_head.conv"),
    (r"rpn\.head\.cls_logits", lambda: "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn\.head\.bbox_pred", lambda: "proposal_generator.rpn_head.anchor_deltas"),
    (r"roi_heads\.box_head\.fc([67])", lambda n: f"roi_heads.box_head.fc{int(n) - 5}"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)", lambda n: f"roi_heads.box_predictor.{n}"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", lambda n: f"roi_heads.mask_head.mask_fcn{n}"),
    (r"roi_heads\.mask_head\.(\d)\.0", lambda n: f"roi_heads.mask_head.mask_fcn{int(n) + 1}"),
    (r"roi_heads\.mask_predictor\.conv5_mask", lambda: "roi_heads.mask_head.deconv"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", lambda: "roi_heads.mask_head.predictor"),
]


def detector_name(key: str) -> str | None:
    """Detectron2's name of a tensor of torchvision's Faster or Mask R-CNN; None if it does not have it."""
    if key.startswith("backbone.body."):
        name = resnet_name(key.removeprefix("backbone.body."))
        return name and f"backbone.bottom_up.{name}"
    for pattern, module in _DETECTOR_MODULES:
        parts = re.fullmatch(rf"{pattern}\.(weight|bias)", key)
        if parts:
            *numbers, tensor = parts.groups()
            return f"{module(*numbers)}.{tensor}"
    return None


def convert_torchvision(checkpoint: dict[str, Any], path: str) -> Weights:
    """
    Weights of a ResNet with torchvision's names, as a backbone, or of a detector.

    The norms' tensors stay what they are: BN's, or those of :class:`MABN2d` where such a model was
    trained with the layers of this package.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: a name is not that of a ResNet or of such a detector.
    """
    state_dict, others = split(checkpoint, ("state_dict", "model"))
    if "backbone.body.conv1.weight" in state_dict and any("inner_blocks" in k for k in state_dict):
        return _convert_detector(state_dict, others, path)
    if not is_resnet(state_dict):
        raise ValueError(
            f"{path} is not of {_SOURCE}: {found(state_dict or checkpoint)}, accepted are {_ACCEPTED}"
        )
    if "bn1.iters" in state_dict:
        raise ValueError(
            f"{path} is not of {_SOURCE}: its norms are those of the MABN release "
            "(bn1.iters), accepted with --from mabn-release"
        )
    state_dict, unknown = rename(state_dict, resnet_name)
    check_all_known(unknown, path, _SOURCE, _ACCEPTED)
    weights = Weights(state_dict, "torchvision", True, others, {}, [])
    resnet = resnet_config(state_dict, weights.norm, stride_in_1x1=False)
    merge(weights.config, torchvision_config(), resnet)
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def _convert_detector(state_dict: StateDict, others: list[str], path: str) -> Weights:
    state_dict, unknown = rename(state_dict, detector_name)
    check_all_known(unknown, path, _SOURCE, _ACCEPTED)
    move_background_last(state_dict)
    notes = [
        "The norms' ε is taken to be 0, as in torchvision's COCO_V1 weights and what was fine-tuned from them. "
        "Others have 1e-5: convert those with --eps 1e-5.",
        "torchvision rounds its anchors: expect slightly different proposals without further training.",
        FOREIGN_NORM_NOTE,
    ]
    if len(state_dict.get("roi_heads.box_predictor.cls_score.bias", ())) == 91:
        _take_coco_classes(state_dict)
        notes.append("Of its 90 classes, COCO's category ids, those are taken that COCO has: 80.")
    body = "backbone.bottom_up."
    backbone = {key[len(body) :]: v for key, v in state_dict.items() if key.startswith(body)}
    config = torchvision_config()
    resnet = resnet_config(backbone, "FrozenBN", stride_in_1x1=False)
    heads = {**heads_config(state_dict), "ANCHOR_GENERATOR": {"OFFSET": 0.0}}
    merge(config, resnet, {"MODEL": heads})
    return Weights(state_dict, "torchvision", False, others, config, notes, eps=0.0)


def _take_coco_classes(state_dict: StateDict) -> None:
    """Detectron2 numbers the 80 categories of COCO one after the other; in place."""
    ids = torch.tensor([category["id"] - 1 for category in COCO_CATEGORIES if category["isthing"]])
    predictor = "roi_heads.box_predictor"
    for tensor in ("weight", "bias"):
        scores, boxes = f"{predictor}.cls_score.{tensor}", f"{predictor}.bbox_pred.{tensor}"
        mask = f"roi_heads.mask_head.predictor.{tensor}"
        state_dict[scores] = state_dict[scores][[*ids, -1]]
        if boxes in state_dict and len(state_dict[boxes]) == 4 * 90:
            state_dict[boxes] = state_dict[boxes].unflatten(0, (90, 4))[ids].flatten(0, 1)
        if mask in state_dict and len(state_dict[mask]) == 90:
            state_dict[mask] = state_dict[mask][ids]


def torchvision_config() -> dict[str, Any]:
    """The pixels and the stride of torchvision's models."""
    config = pixels("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    merge(config, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}}})
    return config
