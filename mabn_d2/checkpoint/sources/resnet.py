"""ResNets under torchvision's names, which the release and torchvision have in common."""

import re
from typing import Any

from .weights import StateDict


def resnet_name(key: str) -> str | None:
    """
    Detectron2's name of a ResNet's tensor: `layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`.

    Args:
        key: torchvision's name.

    Returns:
        the name, or None for a tensor that Detectron2's ResNet does not have.
    """
    if key in ("fc.weight", "fc.bias"):
        return f"stem.{key}"
    parts = re.fullmatch(r"(?:layer([1-4])\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(.+)", key)
    if parts is None:
        return None
    stage, block, kind, number, tensor = parts.groups()
    module = "shortcut" if kind == "downsample." else f"conv{number}"
    if kind == "bn" or (kind, number) == ("downsample.", "1"):
        module += ".norm"
    elif tensor not in ("weight", "kernel_mean"):
        return None
    place = "stem" if stage is None else f"res{int(stage) + 1}.{block}"
    return f"{place}.{module}.{tensor}"


_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def is_resnet(state_dict: StateDict) -> bool:
    return "conv1.weight" in state_dict and "layer1.0.conv1.weight" in state_dict


def resnet_config(state_dict: StateDict, norm: str, stride_in_1x1: bool) -> dict[str, Any]:
    """Options of a ResNet, told by the tensors under Detectron2's names, without a prefix."""
    blocks = {tuple(key.split(".")[:2]) for key in state_dict if re.match(r"res\d\.\d", key)}
    counts = tuple(sum(stage == f"res{n}" for stage, _ in blocks) for n in (2, 3, 4, 5))
    bottleneck = "res2.0.conv3.weight" in state_dict
    options: dict[str, Any] = {"NORM": norm, "STRIDE_IN_1X1": stride_in_1x1}
    if (bottleneck, counts) in _DEPTHS:
        options["DEPTH"] = _DEPTHS[bottleneck, counts]
    if not bottleneck:
        options["RES2_OUT_CHANNELS"] = 64
    elif "res2.0.conv2.weight" in state_dict:
        width, per_group = state_dict["res2.0.conv2.weight"].shape[:2]
        if (width, per_group) != (64, 64):
            groups = width // per_group
            options.update(NUM_GROUPS=groups, WIDTH_PER_GROUP=width // groups)
    return {"MODEL": {"RESNETS": options}}
