"""Weights of other code bases as files that Detectron2 loads."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import nn

from ..layers import CenConv2d, MABN2d
from ..layers.importing import EPS, is_of_mabn, take_over_batch_norm
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


def load_weights(path: str, source: str, eps: float | None = None) -> Weights:
    """
    Reads and converts a file.

    Args:
        path: the file.
        source: a key of `SOURCES`.
        eps: ε of the file's BN, which no file holds; None for what the source usually has. The result is
            the same function with `EPS`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what the source writes. The message is one line that names the file,
            what was found and what is accepted.
    """
    weights = SOURCES[source](read_checkpoint(path), path)
    return _with_usual_eps(weights if eps is None else weights._replace(eps=eps), path)


def _with_usual_eps(weights: Weights, path: str) -> Weights:
    if weights.eps == EPS:
        return weights
    state_dict = dict(weights.state_dict)
    for key, var in weights.state_dict.items():
        name = key.removesuffix(".running_var")
        mean = state_dict.get(f"{name}.running_mean")
        if name == key or mean is None or is_of_mabn(state_dict, f"{name}."):
            continue
        weight, bias = state_dict.get(f"{name}.weight"), state_dict.get(f"{name}.bias")
        norm = nn.BatchNorm2d(len(var), EPS, affine=weight is not None)
        try:
            take_over_batch_norm(norm, weight, bias, mean, var, weights.eps)
        except ValueError as error:
            raise ValueError(f"{path}: {name}, with ε = {weights.eps}: {error}") from error
        del norm.num_batches_tracked
        state_dict.update({f"{name}.{entry}": v for entry, v in norm.state_dict().items()})
    return weights._replace(state_dict=state_dict, eps=EPS)


def as_norm(weights: Weights, path: str, norm: str) -> Weights:
    """
    Weights of BN as those of MABN with the same function, or the reverse, see :func:`mabn_d2.surgery.from_bn`.

    Of a norm `X.norm` with statistics the convolution is `X`, as everywhere in Detectron2 but in the heads of
    RetinaNet and FCOS.

    Args:
        weights: of :func:`load_weights`.
        path: for messages.
        norm: "MABN" or "BN", which is FrozenBN and SyncBN, too.

    Raises:
        ValueError: there is nothing to convert, or a norm stands elsewhere, or there are affine maps, whose
            statistics training data tells: a trainer of this package measures them.
    """
    to_mabn = norm == "MABN"
    accepted = "BN with statistics" if to_mabn else "MABN"
    make_convolution, make_norm = (CenConv2d, MABN2d) if to_mabn else (Conv2d, nn.BatchNorm2d)
    end = ".norm.running_var"
    convolutions = [key.removesuffix(end) for key in weights.state_dict if key.endswith(end)]
    model = nn.Module()
    for name in convolutions:
        out_channels, in_channels, *size = weights.state_dict[f"{name}.weight"].shape
        convolution = make_convolution(
            in_channels, out_channels, size, bias=False, norm=make_norm(out_channels)
        )
        parent = model
        for part in name.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], convolution)
    imported = import_state_dict(model, weights.state_dict, folded=False)
    if imported.affine or not imported.with_statistics:
        found = "norms without statistics" if imported.affine else f"no {accepted}"
        raise ValueError(
            f"{path} holds {found}, --norm {norm} accepts {accepted}. MODEL.WEIGHTS takes others, too: their "
            "statistics are measured on training data"
        )
    state_dict = imported.state_dict
    for name in imported.with_statistics:  # of a BRN this would be the progress
        state_dict.pop(f"{name}.num_batches_tracked", None)
    left = [
        name for key in state_dict if (name := key.removesuffix(".running_var")) != key
        and is_of_mabn(state_dict, f"{name}.") != to_mabn
    ]  # fmt: skip
    if left:
        raise ValueError(
            f"{path} holds {len(left)} norms whose convolution their names do not tell ({left[0]}), --norm "
            f"{norm} accepts X.norm of a convolution X. MODEL.WEIGHTS takes others, too"
        )
    config = copy.deepcopy(weights.config)
    merge(config, {"MODEL": {"RESNETS": {"NORM": norm}}})
    for part in config["MODEL"].values():
        if isinstance(part, dict) and part.get("NORM"):
            part["NORM"] = norm
    notes = [note for note in weights.notes if note != FOREIGN_NORM_NOTE]
    return weights._replace(state_dict=state_dict, config=config, notes=notes)


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
