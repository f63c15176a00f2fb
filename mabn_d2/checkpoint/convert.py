"""Weights of other code bases as files that Detectron2 loads."""

import os
from collections.abc import Callable
from typing import Any

import torch

from ..utils.files import atomic_write
from .reading import read_checkpoint
from .sources.detectron2 import convert_detectron2
from .sources.release import convert_release
from .sources.torchvision import convert_torchvision
from .sources.weights import Weights

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
