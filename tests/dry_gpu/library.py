"""The library that stands in front of CUDA: runtime.cpp, built for the PyTorch of this interpreter."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATH_VARIABLE = "DRY_GPU_LIBRARY"  # path of the library, set in a process that runs under it

# What of CUDA PyTorch calls. NVRTC and NCCL are not among it: the first works without a GPU.
_CUDA_SYMBOL = re.compile(r"(__cuda|cuda[A-Z]|cu[A-Z]|cublas|cudnn|cusparse|cusolver|cufft|curand)")
# Functions of the real libraries that need no device.
_REAL = re.compile(
    r".*(ErrorString|StatusString|ErrorName|Version|GetProperty)$|cuFile|"
    r"cudnn(Create|Destroy)(Tensor|Filter|Convolution|Activation|Pooling|SpatialTransformer)Descriptor$|"
    r"cudnn[SG]et(TensorNd|FilterNd|ConvolutionNd|Activation|Pooling2d|SpatialTransformerNd)Descriptor$|"
    r"cudnnSetConvolution(GroupCount|MathType)$"
)
_NOT_SUPPORTED = {
    "cublas": 15, "cudnn": 9, "cusparse": 10, "cusolver": 9, "cufft": 16, "curand": 999,
}  # fmt: skip
_NOT_SUPPORTED_CUDA = 801
_NOT_SUPPORTED_CUDNN_9 = 3000


class Unavailable(RuntimeError):
    """There can be no dry GPU here: PyTorch is built without CUDA, or a compiler is missing."""


def is_active() -> bool:
    """Whether this process runs on the dry GPU."""
    return PATH_VARIABLE in os.environ


@functools.lru_cache(None)
def loaded() -> ctypes.CDLL:
    """
    The library under which this process runs.

    Raises:
        RuntimeError: it runs under none.
    """
    if not is_active():
        raise RuntimeError("dry_gpu: start the program with `python -m tests.dry_gpu run`")
    library = ctypes.CDLL(os.environ[PATH_VARIABLE])
    library.dry_gpu_log_size.restype = library.dry_gpu_read_log.restype = ctypes.c_size_t
    library.dry_gpu_read_log.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    library.dry_gpu_answers.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def set_answers(is_answering: bool, answers: Sequence[int] = ()) -> None:
    """How scalars read as they are copied from the device: as they are, or these in turn and then 0."""
    values = (ctypes.c_int64 * max(len(answers), 1))(*answers)
    loaded().dry_gpu_answers(is_answering, values, len(answers))


def build() -> Path:
    """
    The library for this interpreter's PyTorch, compiled if the cache does not have it.

    The cache is the folder DRY_GPU_CACHE, by default ~/.cache/dry_gpu. In it each library has a folder
    of its own, where it bears the driver's names: Triton looks for these.

    Raises:
        Unavailable: PyTorch is built without CUDA, or a compiler is missing.
    """
    torch_folder = _package_folder("torch")
    if torch_folder is None:
        raise Unavailable("dry_gpu: PyTorch is not installed for this interpreter")
    versions = (torch_folder / "version.py").read_text()
    found = re.search(r"^cuda\b.*?['\"](\d+)\.(\d+)", versions, re.M)
    if not found:
        raise Unavailable("dry_gpu: this PyTorch is built without CUDA, install a +cu wheel")
    major, minor = int(found[1]), int(found[2])
    callers = sorted((torch_folder / "lib").glob("*.so*"))
    for package in ("torchvision", "detectron2"):
        folder = _package_folder(package)
        callers += sorted(folder.glob("*.so")) if folder else []
    key = hashlib.sha256(versions.encode())
    for path in (HERE / "runtime.cpp", Path(__file__)):
        key.update(path.read_bytes())
    for path in callers:
        key.update(f"{path.name} {path.stat().st_size}\n".encode())
    cache = Path(os.environ.get("DRY_GPU_CACHE") or Path.home() / ".cache" / "dry_gpu")
    folder = cache / key.hexdigest()[:16]
    if not folder.exists():
        _compile(folder, callers, major, minor)
    return folder / "libcuda.so.1"


def _compile(folder: Path, callers: list[Path], major: int, minor: int) -> None:
    missing = [tool for tool in ("g++", "nm") if not shutil.which(tool)]
    if missing:
        raise Unavailable(
            f"dry_gpu: {' and '.join(missing)} needed to build its library, not found"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        rest, library = Path(partial, "rest.cpp"), Path(partial, "library", "libcuda.so.1")
        rest.write_text(_unsupported(_undefined(callers), major))
        library.parent.mkdir()
        command = [
            "g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
            f"-DCUDA_VERSION={major * 1000 + minor * 10}", str(HERE / "runtime.cpp"), str(rest),
            "-o", str(library), "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL",
            f"-Wl,-soname,{library.name}", "-ldl",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"dry_gpu: {' '.join(command)}\n{done.stderr}")
        (library.parent / "libcuda.so").symlink_to(library.name)
        try:
            library.parent.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _undefined(libraries: list[Path]) -> Iterable[str]:
    """The symbols that the libraries take from others."""
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return sorted({line.split()[-1].split("@")[0] for line in lines if " U " in line})


def _unsupported(names: Iterable[str], cuda_major: int) -> str:
    """C++ that answers "not supported", unless runtime.cpp has the function (hence weak)."""
    lines = ['extern "C" int dry_gpu_unsupported(const char* name, int code);']
    for name in names:
        if not _CUDA_SYMBOL.match(name) or _REAL.match(name):
            continue
        codes = [code for prefix, code in _NOT_SUPPORTED.items() if name.startswith(prefix)]
        code = codes[0] if codes else _NOT_SUPPORTED_CUDA
        if name.startswith("cudnn") and cuda_major >= 13:
            code = _NOT_SUPPORTED_CUDNN_9
        lines.append(
            f'extern "C" __attribute__((weak, visibility("default"))) int {name}(...) '
            f'{{ return dry_gpu_unsupported("{name}", {code}); }}'
        )
    return "\n".join(lines) + "\n"
