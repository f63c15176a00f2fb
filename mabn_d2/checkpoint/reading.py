"""Reads checkpoints without executing anything that they contain."""

import pickle
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

# ---------------------------------------------------------------------------------------- reading


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickle's protocol 2 writes bytes."""
    return text.encode("latin1")


_PICKLED_TYPES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}


for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    for _module, _name, _function in (
        ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
        ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
        ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
    ):
        _PICKLED_TYPES[f"{_core}.{_module}", _name] = _function


class _ArrayUnpickler(pickle.Unpickler):
    """Builds basic types and numpy arrays, and nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _PICKLED_TYPES:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return _PICKLED_TYPES[module, name]


def read_checkpoint(path: str) -> dict[str, Any]:
    """
    The content of a checkpoint, without executing anything that it may contain.

    Args:
        path: a file of `torch.save`, or a `.pkl` with numpy arrays.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else than a dictionary of tensors, arrays and basic types.
    """
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                checkpoint = _ArrayUnpickler(f, encoding="latin1").load()
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise whatever the parser stumbled over
        raise ValueError(
            f"{path} is not read: only dictionaries of tensors, numpy arrays and basic types are "
            f"accepted, and nothing that could run code ({_reason(error)})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, accepted is a dictionary of tensors"
        )
    return checkpoint


def _reason(error: Exception) -> str:
    """Why a file was refused, in a few words."""
    if not isinstance(error, (pickle.UnpicklingError, RuntimeError)):
        return "the file is damaged or of another format"
    # What PyTorch says around the name of the refused type, it says differently in each version.
    named = re.search(r"(?:class|GLOBAL:?|global) ([\w.]+\.\w+)", str(error))
    reason = f"it contains {named[1]}" if named else str(error).split("\n")[0]
    return " ".join(reason.split())[:200]
