"""Weights under the names of Detectron2, and what all sources share."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

StateDict = dict[str, torch.Tensor]
FOREIGN_NORM_NOTE = (
    "These weights were trained with BN. They are not for MABN, which needs weights that were "
    "trained with MABN and centralized kernels: fine-tuning with BN weights loses about half of "
    "the AP (https://github.com/megvii-model/MABN/issues/2)."
)


class Weights(NamedTuple):
    """
    Weights under the names of Detectron2.

    Attributes:
        state_dict: Detectron2's names -> tensors.
        author: where they are from; Detectron2 logs it.
        matching_heuristics: whether the names lack the prefix that they have in a model, as in
            `stem.conv1.weight`: Detectron2 then finds the place for them.
        left_over: names of the source file that were not taken.
        config: nested options of a Detectron2 config that go with the weights.
        notes: sentences that the user should read.
    """

    state_dict: StateDict
    author: str
    matching_heuristics: bool
    left_over: list[str]
    config: dict[str, Any]
    notes: list[str]

    @property
    def norm(self) -> str:
        """:func:`norm_of` the state dict."""
        return norm_of(self.state_dict)


def norm_of(state_dict: StateDict) -> str:
    """'MABN', 'BN' or '', told by the statistics."""
    if any(key.endswith(".psi.count") for key in state_dict):
        return "MABN"
    return "BN" if any(re.search(r"running_mean|_bn_", key) for key in state_dict) else ""


def _is_array(value: Any) -> bool:
    is_numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return is_numbers or isinstance(value, torch.Tensor)


def tensors(entries: dict[str, Any]) -> StateDict:
    """The tensors and arrays of a dictionary, as tensors that share no memory."""
    return {
        key: torch.as_tensor(value).detach().clone()
        for key, value in entries.items()
        if isinstance(key, str) and _is_array(value)
    }


def split(checkpoint: dict[str, Any], wrappers: Iterable[str]) -> tuple[StateDict, list[str]]:
    """The model's tensors, wherever a checkpoint keeps them, and the names of all other entries."""
    for wrapper in wrappers:
        if isinstance(checkpoint.get(wrapper), dict):
            others = [key for key in checkpoint if key != wrapper]
            checkpoint = checkpoint[wrapper]
            break
    else:
        others = []
    state_dict = tensors(checkpoint)
    others += [str(key) for key in checkpoint if key not in state_dict]
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key[len("module.") :]: value for key, value in state_dict.items()}
    return state_dict, others


def found(checkpoint: dict[str, Any]) -> str:
    keys = [str(key) for key in list(checkpoint)[:4]] + ["..."] * (len(checkpoint) > 4)
    return f"found {len(checkpoint)} entries ({', '.join(keys)})"


def rename(
    state_dict: StateDict, rename: Callable[[str], str | None]
) -> tuple[StateDict, list[str]]:
    """The tensors under their new names, and the old names of those without one."""
    names = {key: rename(key) for key in state_dict}
    renamed = {name: state_dict[key] for key, name in names.items() if name is not None}
    return renamed, [key for key, name in names.items() if name is None]


# ----------------------------------------------------------------------------------------- naming


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


# ----------------------------------------------------------------------------------- descriptions


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


def pixels(channels: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "MODEL": {"PIXEL_MEAN": mean, "PIXEL_STD": std},
        "INPUT": {"FORMAT": channels},
    }


def torchvision_config() -> dict[str, Any]:
    config = pixels("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    merge(config, {"MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}}})
    return config


def merge(options: dict[str, Any], *others: dict[str, Any]) -> None:
    for other in others:
        for key, value in other.items():
            if isinstance(value, dict):
                merge(options.setdefault(key, {}), value)
            else:
                options[key] = value
