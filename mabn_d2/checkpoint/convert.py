"""Weights of other code bases as files that Detectron2 loads."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers import CenConv2d, MABN2d
from ..surgery import import_state_dict
from ..utils.files import atomic_write
from .reading import read_checkpoint
from .sources.detectron2 import convert_detectron2
from .sources.release import convert_release
from .sources.torchvision import convert_torchvision
from .sources.weights import FOREIGN_NORM_NOTE, Weights, merge

SOURCES: dict[str, Callable[[dict[str, Any], str], Weights]] = {
    "mabn-release": convert_release,
    "torchvision": convert_torchvision,
    "detectron2": convert_detectron2,
}


def load_weights(path: str, source: str) -> Weights:
    """
    Reads and converts a file.

    Args:
        path: the file.
        source: a key of `SOURCES`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what the source writes. The message is one line that names the file,
            what was found and what is accepted.
    """
    return SOURCES[source](read_checkpoint(path), path)


def as_mabn(weights: Weights, path: str) -> Weights:
    """
    Weights of BN as those of MABN with the same function, see :func:`mabn_d2.surgery.from_bn`.

    Of a norm `X.norm` with statistics the convolution is `X`, as everywhere in Detectron2.

    Args:
        weights: of :func:`load_weights`.
        path: for messages.

    Raises:
        ValueError: there is no BN with statistics, or there are affine maps, whose statistics training data
            tells: a trainer of this package measures them.
    """
    end = ".norm.running_var"
    convolutions = [key.removesuffix(end) for key in weights.state_dict if key.endswith(end)]
    model = nn.Module()
    for name in convolutions:
        out_channels, in_channels, *size = weights.state_dict[f"{name}.weight"].shape
        norm = MABN2d(out_channels)
        convolution = CenConv2d(in_channels, out_channels, size, bias=False, norm=norm)
        parent = model
        for part in name.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], convolution)
    imported = import_state_dict(model, weights.state_dict, folded=False)
    if imported.affine or not imported.with_statistics:
        found = "norms without statistics" if imported.affine else "no BN with statistics"
        raise ValueError(
            f"{path} holds {found}, --norm accepts BN with statistics. MODEL.WEIGHTS takes others, too: their "
            "statistics are measured on training data"
        )
    config = copy.deepcopy(weights.config)
    merge(config, {"MODEL": {"RESNETS": {"NORM": "MABN"}}})
    notes = [note for note in weights.notes if note != FOREIGN_NORM_NOTE]
    return weights._replace(state_dict=imported.state_dict, config=config, notes=notes)


def save_weights(weights: Weights, path: str) -> None:
    """
    Writes a file that `DetectionCheckpointer` loads, completely or not at all.

    Raises:
        ValueError: the name is not that of a new `.pth` file in an existing folder.
        OSError: the file cannot be written.
    """
    check_destination(path)
    content: dict[str, Any] = {"model": weights.state_dict, "__author__": weights.author}
    if weights.matching_heuristics:
        content["matching_heuristics"] = True
    with atomic_write(path) as f:
        torch.save(content, f)


def check_destination(path: str) -> None:
    """
    Raises:
        ValueError: the name is not that of a new `.pth` file in an existing folder.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten")
    if not path.endswith(".pth"):
        raise ValueError(f"{path} must end in .pth, by which Detectron2 knows the format")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{path} cannot be written: the folder does not exist")
