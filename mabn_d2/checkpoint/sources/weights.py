"""Weights under the names of Detectron2, and what all sources share."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from ...layers.importing import EPS
from ..norms import norm_of

StateDict = dict[str, torch.Tensor]
FOREIGN_NORM_NOTE = (
    "These weights were trained with BN. In a model with MABN the trainers of this package keep their "
    "function (MODEL.WEIGHTS_IMPORT exact). Other scripts do where the file has BN's statistics, and load the "
    "rest as it is, which is another function."
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
        eps: ε of its norms that have statistics.
    """

    state_dict: StateDict
    author: str
    matching_heuristics: bool
    left_over: list[str]
    config: dict[str, Any]
    notes: list[str]
    eps: float = EPS

    @property
    def norm(self) -> str:
        """:func:`norm_of` the state dict."""
        return norm_of(self.state_dict)


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


def check_all_known(unknown: list[str], path: str, source: str, accepted: str) -> None:
    """
    A source takes a file when it knows every tensor in it, or one of half a network passes for its own.

    Args:
        unknown: names of the tensors that the source does not know.
        path: of the file.
        source: for the message.
        accepted: for the message.

    Raises:
        ValueError: there are such tensors.
    """
    if unknown:
        names = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        raise ValueError(
            f"{path} is not of {source}: {len(unknown)} of its tensors are not known there ({names}), "
            f"accepted are {accepted}"
        )


# ------------------------------------------------------------------------ lines of a config


def pixels(channels: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "MODEL": {"PIXEL_MEAN": mean, "PIXEL_STD": std},
        "INPUT": {"FORMAT": channels},
    }


def merge(options: dict[str, Any], *others: dict[str, Any]) -> None:
    for other in others:
        for key, value in other.items():
            if isinstance(value, dict):
                merge(options.setdefault(key, {}), value)
            else:
                options[key] = value
