"""Weights of Detectron2 and of its model zoo."""

import re
from typing import Any

from .torchvision import torchvision_config
from .weights import FOREIGN_NORM_NOTE, Weights, found, merge, pixels, split, tensors

# Modules of other code bases that begin as Detectron2's do: torchvision's and DETR's detectors, and
# maskrcnn-benchmark's.
_OTHERS = re.compile(r"backbone\.(\d+\.)?(body|fpn)\.")
_OURS = re.compile(r"backbone\.|stem\.|res2\.")


def convert_detectron2(checkpoint: dict[str, Any], path: str) -> Weights:
    """
    Weights of a checkpoint of Detectron2 or of its model zoo, without the trainer's state.

    Detectron2's models have any names, so a file is told by its layout, by the backbone's first names, and by
    having no module of the code bases that use the same ones. All tensors are taken.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: the layout or the names are not those of Detectron2.
    """
    if "blobs" in checkpoint or "conv1_w" in checkpoint:
        return _convert_caffe2(checkpoint)
    state_dict, others = split(checkpoint, ("model",))
    is_ours = any(map(_OURS.match, state_dict)) and not any(map(_OTHERS.match, state_dict))
    if "model" not in checkpoint or not is_ours:
        raise ValueError(
            f"{path} is not of Detectron2: {found(state_dict or checkpoint)}, accepted is "
            "{'model': {'backbone.bottom_up.stem.conv1.weight': ..., or 'stem.conv1.weight': ...}}"
        )
    heuristics = bool(checkpoint.get("matching_heuristics", False))
    author = str(checkpoint.get("__author__", "Detectron2"))
    others = [key for key in others if key not in ("__author__", "matching_heuristics")]
    config = {} if author != "torchvision" else torchvision_config()
    weights = Weights(state_dict, author, heuristics, others, config, [])
    if weights.norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights


def _convert_caffe2(checkpoint: dict[str, Any]) -> Weights:
    """Detectron2 itself renames these while it loads them, told by the author."""
    blobs = checkpoint.get("blobs", checkpoint)
    state_dict = {k: v for k, v in tensors(blobs).items() if not k.endswith("_momentum")}
    left_over = [key for key in {**checkpoint, **blobs} if key not in state_dict and key != "blobs"]
    config = pixels("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
    merge(config, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": True}}})
    return Weights(state_dict, "Caffe2", True, left_over, config, [FOREIGN_NORM_NOTE])
