"""
Reads checkpoints without executing anything that they contain.

A checkpoint is a pickle with the bytes of its tensors beside it. A pickle is a program: it names functions
and calls them. The reader here knows the formats itself, and one short list of what a pickle may name.

`torch.load(weights_only=True)` does not do: before torch 2.6 it hands archives of TorchScript and tar files
to loaders that execute what is in them (CVE-2025-32434), and it does not read pickles of numpy arrays.
"""

import logging
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import torch

logger = logging.getLogger(__name__)

TRUST = "MABN_D2_TRUST_CHECKPOINTS"


class _Unreadable(Exception):
    """Why a file is no checkpoint, in words."""


class _Foreign(Exception):
    """What a pickle names that is not on the list."""


# ------------------------------------------------------------------------ what a pickle may contain


class _Function:
    """Something that a pickle may call, but not change."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise _Unreadable("it changes a function")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickle's protocol 2 writes bytes."""
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How pickle's protocol 2 writes bytes where there are none."""
    return b""


class _DType:
    """
    Stands for a numpy.dtype, whose own `__setstate__` does not check what it is given.

    A type that says of itself that it holds no objects makes of an array's bytes pointers.
    """

    def __init__(self, name: str, *_):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSUO":
            raise _Unreadable(f"it contains an array of {self.dtype}")

    def __setstate__(self, state):
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its type from a :class:`_DType`."""

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        super().__setstate__((1, shape, dtype.dtype, is_fortran, data))


def _new_array(*_) -> _Array:
    return _Array(0)


def _scalar(dtype: _DType, data: bytes | str) -> np.generic:
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote it
    return np.frombuffer(data, dtype.dtype)[0]


def _from_buffer(data, dtype: _DType, shape, order) -> np.ndarray:
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


class _Storage(NamedTuple):
    """The bytes behind tensors, and the type that they have for a tensor that does not say its own."""

    content: torch.Tensor  # uint8, 1-D
    dtype: torch.dtype


def _tensor(storage: _Storage, offset, size, stride, *_, dtype=None) -> torch.Tensor:
    whole = storage.content.untyped_storage()
    num_bytes = whole.nbytes()
    tensor = torch.empty(0, dtype=dtype or storage.dtype).set_(whole, offset, size, stride)
    if whole.nbytes() != num_bytes:
        raise _Unreadable("it contains a tensor that is larger than its storage")
    return tensor


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> torch.Tensor:
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _parameter(data: torch.Tensor, *_) -> torch.Tensor:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function(OrderedDict),
    ("collections", "Counter"): _Function(Counter),  # the milestones of PyTorch's MultiStepLR
    ("builtins", "set"): _Function(set),
    ("__builtin__", "set"): _Function(set),
    ("_codecs", "encode"): _Function(_latin1),
    ("__builtin__", "bytes"): _Function(_no_bytes),
    ("numpy", "dtype"): _Function(_DType),
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("torch", "Size"): _Function(torch.Size),
    ("torch", "device"): _Function(torch.device),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    **{("torch", name): v for name, v in vars(torch).items() if isinstance(v, torch.dtype)},
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ALLOWED[f"{_numpy}.multiarray", "_reconstruct"] = _Function(_new_array)
    _ALLOWED[f"{_numpy}.multiarray", "scalar"] = _Function(_scalar)
    _ALLOWED[f"{_numpy}.numeric", "_frombuffer"] = _Function(_from_buffer)


class _Unpickler(pickle.Unpickler):
    """Builds basic types, numpy arrays and tensors, and nothing else."""

    def __init__(self, file: IO[bytes], storage: Callable[..., _Storage] | None = None):
        """
        Args:
            storage: called with what a pickle of torch.save says of a storage: its type, key, location,
                number of elements, and in files of before torch 1.6 its place in another one.
        """
        super().__init__(file, encoding="latin1")  # of the strings that Python 2 wrote
        self._storage = storage

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise _Foreign(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        if self._storage is None or not isinstance(pid, tuple) or pid[0] != "storage":
            raise _Unreadable("it refers to something outside of it")
        return self._storage(*pid[1:])


# ----------------------------------------------------------------------------------------- formats


def _read_zip(file: IO[bytes]) -> Any:
    """What torch.save writes: `NAME/data.pkl`, and the bytes of each storage in `NAME/data/KEY`."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(name == "constants.pkl" or name.startswith("code/") for name in entries):
            raise _Unreadable("it is an archive of TorchScript, which is a program")
        if "data.pkl" not in entries:
            raise _Unreadable("it is a zip archive, but not one of torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise _Unreadable("it is a compressed archive, which torch.save does not write")
        if "byteorder" in entries and archive.read(entries["byteorder"]).decode() != sys.byteorder:
            raise _Unreadable("its numbers are in another byte order")
        contents: dict[str, torch.Tensor] = {}

        def storage(dtype: torch.dtype, key: str, location: str, numel: int) -> _Storage:
            info = entries[f"data/{key}"]
            if info.file_size != numel * dtype.itemsize:
                raise _Unreadable(f"its storage {key} has another size than it says")
            if key not in contents:
                contents[key] = torch.empty(info.file_size, dtype=torch.uint8)
                with archive.open(info) as f:
                    _fill(contents[key], f)
            return _Storage(contents[key], dtype)

        with archive.open(entries["data.pkl"]) as f:
            return _Unpickler(f, storage).load()


_MAGIC = 0x1950A86A20F9469CFC6C


def _read_stream(file: IO[bytes]) -> Any:
    """A pickle, or what torch.save wrote before torch 1.6: pickles with the bytes of the storages behind."""
    content = _Unpickler(file).load()
    if not isinstance(content, int) or content != _MAGIC:
        return content
    contents: dict[str, torch.Tensor] = {}

    def storage(dtype: torch.dtype, key: str, location: str, numel: int, view=None) -> _Storage:
        if view is not None:
            raise _Unreadable("it contains parts of storages, as before torch 0.4")
        if key not in contents:
            contents[key] = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
            sizes[key] = numel
        return _Storage(contents[key], dtype)

    sizes: dict[str, int] = {}
    _Unpickler(file).load()  # the version of the format
    system = _Unpickler(file).load()
    if system["little_endian"] != (sys.byteorder == "little"):
        raise _Unreadable("its numbers are in another byte order")
    content = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        if struct.unpack("=q", file.read(8))[0] != sizes[key]:
            raise _Unreadable(f"its storage {key} has another size than it says")
        _fill(contents[key], file)
    return content


def _fill(content: torch.Tensor, file: IO[bytes]) -> None:
    if file.readinto(memoryview(content.numpy())) != len(content):  # type: ignore[attr-defined]
        raise EOFError


def _plain(value: Any) -> Any:
    """The arrays in nested dictionaries as ordinary ones."""
    if isinstance(value, dict):
        for key in value:
            value[key] = _plain(value[key])
    return value.view(np.ndarray) if isinstance(value, _Array) else value


def read_checkpoint(path: str) -> dict[str, Any]:
    """
    The content of a checkpoint, without executing anything that it may contain.

    Args:
        path: a file of `torch.save`, or a pickle with numpy arrays, whatever its name.

    Returns:
        basic types, tensors on the CPU and numpy arrays. A parameter is a tensor.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, or contains something else. With `MABN_D2_TRUST_CHECKPOINTS=1` in
            the environment, the latter is loaded by pickle, which executes it.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, accepted is a file")
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)
        try:
            checkpoint = _plain(_reader(start)(file))
        except _Foreign as error:
            if os.environ.get(TRUST) != "1":
                raise ValueError(
                    f"{path} is not read: it contains {error}. Accepted are tensors, numpy arrays and basic "
                    f"types, as anything else may run code. If you trust the file, set {TRUST}=1 in the "
                    "environment"
                ) from error
            checkpoint = _read_trusted(path)
        except Exception as error:  # damaged files raise whatever the parser stumbled over
            reason = (
                error if isinstance(error, _Unreadable) else "it is damaged or of another format"
            )
            raise ValueError(
                f"{path} is no checkpoint: {reason}. Accepted are files of torch.save and pickles of "
                "numpy arrays"
            ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, accepted is a dictionary of tensors"
        )
    return checkpoint


def _reader(start: bytes) -> Callable[[IO[bytes]], Any]:
    """How to read a file that begins with these bytes."""
    if not start:
        raise _Unreadable("it is empty")
    if start.lstrip().startswith(b"<"):
        raise _Unreadable("it is a web page")
    if start[257:262] == b"ustar":
        raise _Unreadable("it is a tar archive, as torch.save wrote before torch 0.2")
    return _read_zip if start.startswith(b"PK") else _read_stream


def _read_trusted(path: str) -> Any:
    logger.warning("%s is trusted: what it contains is executed", path)
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            content = pickle.load(file, encoding="latin1")
        if not isinstance(content, int):  # the number that an old file of torch.save begins with
            return content
    return torch.load(path, map_location="cpu", weights_only=False)
