"""Weights of the authors' release of MABN, https://github.com/megvii-model/MABN."""

import re
from typing import Any

import torch

from ...layers import MABN2d
from ..norms import norm_of
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

_SOURCE = "the MABN release"
_ACCEPTED = (
    "detectors of maskrcnn-benchmark, Faster and Mask R-CNN with FPN (backbone.body.stem.conv1.weight, ...), "
    "and ResNets (conv1.weight, layer1.0.conv1.weight, ...)"
)
# Tensors of maskrcnn-benchmark that Detectron2 has no place for: the anchors, and a bias that the norm behind
# it makes needless but for the running mean.
_NOT_TAKEN = re.compile(
    r"rpn\.anchor_generator\.cell_anchors\.\d+|backbone\.body\.stem\.conv1\.bias"
)

# maskrcnn-benchmark's modules -> Detectron2's.
_DETECTOR_MODULES = {
    **{f"backbone.fpn.fpn_inner{n}": f"backbone.fpn_lateral{n + 1}" for n in (1, 2, 3, 4)},
    **{f"backbone.fpn.fpn_layer{n}": f"backbone.fpn_output{n + 1}" for n in (1, 2, 3, 4)},
    "rpn.head.conv": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box.feature_extractor": "roi_heads.box_head",
    "roi_heads.box.feature_extractor.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box.feature_extractor.fc7": "roi_heads.box_head.fc2",
    "roi_heads.box.predictor": "roi_heads.box_predictor",
    "roi_heads.mask.feature_extractor": "roi_heads.mask_head",
    "roi_heads.mask.predictor.conv5_mask": "roi_heads.mask_head.deconv",
    "roi_heads.mask.predictor.mask_fcn_logits": "roi_heads.mask_head.predictor",
}
_BOX_CONVOLUTION = r"(roi_heads\.box\.feature_extractor\.)xconvs\.(\d+)\.(.+)"


def detector_name(key: str) -> str | None:
    """
    Detectron2's name of a tensor of maskrcnn-benchmark's Faster or Mask R-CNN with FPN.

    Args:
        key: maskrcnn-benchmark's name; the box head's convolutions are named `conv1`, ... in place
            of `xconvs.0`, ...

    Returns:
        the name, or None for a tensor that Detectron2's model does not have.
    """
    if key.startswith("backbone.body."):
        name = resnet_name(re.sub(r"^backbone\.body\.(stem\.)?", "", key))
        return name and f"backbone.bottom_up.{name}"
    for module in sorted(_DETECTOR_MODULES, key=len, reverse=True):
        if key.startswith(f"{module}."):
            name = _DETECTOR_MODULES[module] + key[len(module) :]
            # A convolution with a norm is a sequence of both.
            return re.sub(r"(fpn_\w+\d|mask_fcn\d)\.([01])\.", _norm_of_sequence, name)
    return None


def _norm_of_sequence(match: re.Match) -> str:
    return f"{match[1]}.norm." if match[2] == "1" else f"{match[1]}."


def _name_box_convolutions(state_dict: StateDict) -> StateDict:
    """`xconvs.I` is a plain sequence: I becomes the number of the convolution, or of its norm's."""
    parts = {key: re.fullmatch(_BOX_CONVOLUTION, key) for key in state_dict}
    places = sorted(
        int(match[2]) for key, match in parts.items() if match and state_dict[key].dim() == 4
    )

    def name(key: str) -> str:
        match = parts[key]
        if match is None:
            return key
        prefix, place, tensor = match[1], int(match[2]), match[3]
        module = f"conv{sum(p <= place for p in places)}{'' if place in places else '.norm'}"
        return f"{prefix}{module}.{tensor}"

    return {name(key): value for key, value in state_dict.items()}


# ------------------------------------------------------------------------------------ conversions


def _release_norm(norm: StateDict) -> StateDict:
    """
    The state of one MABN of the release -> that of a :class:`MABN2d`.

    The detector's norm keeps one statistic per iteration (`iters`, `buffer_x2`, `buffer_gz`); that
    of the classifier keeps those of the last iteration's groups of two images, the oldest first
    (`iters`, `pre_x2`, `pre_gz`, and the constant `sta_matrix`).
    """
    norm = {key: value for key, value in norm.items() if key != "sta_matrix"}
    norm["running_var"] = norm["running_var"].reshape(-1)
    if "buffer_x2" in norm:
        ours = MABN2d(len(norm["running_var"]), buffer_size=len(norm["buffer_x2"]))
        ours.load_state_dict(norm)
        return dict(ours.state_dict())
    groups = len(norm["pre_x2"]) if "pre_x2" in norm else 0
    count = norm.pop("iters", torch.zeros(1)).reshape(()).long() * groups
    for theirs, name in (("pre_x2", "second_moment"), ("pre_gz", "psi")):
        if theirs in norm:
            norm[f"{name}.values"] = norm.pop(theirs)
        norm[f"{name}.count"] = count.clone()
    return norm


def _convert_release_norms(state_dict: StateDict, path: str) -> StateDict:
    """Every norm with a second moment and no mean is a MABN; those of this package stay."""
    state_dict = dict(state_dict)
    keys = list(state_dict)
    for key in keys:
        prefix = key[: -len("running_var")]
        others = (f"{prefix}running_mean", f"{prefix}psi.count")
        if key.endswith(".running_var") and not any(other in state_dict for other in others):
            norm = {k[len(prefix) :]: state_dict.pop(k) for k in keys if k.startswith(prefix)}
            try:
                norm = _release_norm(norm)
            except RuntimeError as error:
                raise ValueError(
                    f"{path} holds {prefix}{{{', '.join(norm)}}}, accepted are a MABN's weight, "
                    "bias, running_var, iters, buffer_x2 and buffer_gz, in shapes that agree"
                ) from error
            state_dict.update({prefix + k: v for k, v in norm.items()})
    return state_dict


def convert_release(checkpoint: dict[str, Any], path: str) -> Weights:
    """
    Weights of the authors' release: a detector's checkpoint, or a classifier's as the backbone.

    Args:
        checkpoint: as from :func:`read_checkpoint`.
        path: for messages.

    Raises:
        ValueError: a name is not one of the release, or norms are not MABN.
    """
    state_dict, others = split(checkpoint, ("model", "state_dict"))
    detector = any(key.startswith("backbone.body.") for key in state_dict)
    if detector and not any(key.startswith("backbone.fpn.") for key in state_dict):
        raise ValueError(f"{path} holds a detector without FPN, accepted are those with FPN")
    if not detector and not is_resnet(state_dict):
        raise ValueError(
            f"{path} is not of {_SOURCE}: {found(state_dict or checkpoint)}, accepted are {_ACCEPTED}"
        )
    if not detector and norm_of(state_dict) == "BN":
        raise ValueError(
            f"{path} is not of {_SOURCE}: its norms are BN (bn1.running_mean), accepted "
            "with --from torchvision"
        )
    state_dict = _convert_release_norms(state_dict, path)
    if detector:
        return _release_detector(state_dict, others, path)
    state_dict, unknown = rename(state_dict, resnet_name)
    check_all_known(unknown, path, _SOURCE, _ACCEPTED)
    config = resnet_config(state_dict, "MABN", stride_in_1x1=False)
    merge(config, pixels("BGR", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    notes = [
        "The config is that of the release's classifier. The release's detector starts from its "
        "weights with PIXEL_MEAN [102.9801, 115.9465, 122.7717] and STRIDE_IN_1X1 True."
    ]
    return Weights(state_dict, "MABN release", True, others, config, notes)


def _release_detector(state_dict: StateDict, others: list[str], path: str) -> Weights:
    state_dict, unknown = rename(_name_box_convolutions(state_dict), detector_name)
    check_all_known(
        [key for key in unknown if not _NOT_TAKEN.fullmatch(key)], path, _SOURCE, _ACCEPTED
    )
    move_background_last(state_dict)
    weights = Weights(state_dict, "MABN release", False, others + unknown, {}, [])
    norm = weights.norm
    body = "backbone.bottom_up."
    merge(
        weights.config,
        resnet_config(
            {key[len(body) :]: v for key, v in state_dict.items() if key.startswith(body)},
            norm, stride_in_1x1=True,
        ),
        pixels("BGR", [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
        {"MODEL": heads_config(state_dict)},
    )  # fmt: skip
    weights.notes.append(
        "maskrcnn-benchmark counts a box's last pixel in its width (TO_REMOVE = 1), rounds its "
        "anchors, and pools without the half-pixel shift. OFFSET and POOLER_TYPE bring Detectron2 "
        "close, not to the same boxes: expect a slightly different AP without further training."
    )
    if norm == "BN":
        weights.notes.append(FOREIGN_NORM_NOTE)
    return weights
