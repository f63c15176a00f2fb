"""What the device was asked: events, and the log of them."""

import collections
import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .library import loaded


class Frame(NamedTuple):
    """One of Python's frames."""

    file: str
    line: int
    function: str


class Event(NamedTuple):
    """One request to the device."""

    kind: str  # kernel, library (a call of cuBLAS or cuDNN), memset, copy, sync, malloc or free
    name: str  # of the kernel (mangled), of the library's function, of the call that waits; H2D, D2H, D2D
    size: int  # bytes of a copy, memset or malloc
    grid: str  # of a kernel, "x,y,z"
    block: str
    # Innermost first, if recorded. Empty in the backward of a built-in operator, which autograd's
    # thread calls without Python.
    stack: tuple[Frame, ...]

    @property
    def is_launch(self) -> bool:
        return self.kind in ("kernel", "library", "memset") or self.name == "D2D"

    @property
    def author(self) -> str:
        """File of the innermost frame that is not PyTorch's own; empty without a stack."""
        files = (frame.file for frame in self.stack)
        return next((file for file in files if not _IS_PYTORCH.search(file)), "")


_IS_PYTORCH = re.compile(r"/(torch|triton)/|/dry_gpu/computing\.py$|/contextlib\.py$")


class Log:
    """What the device was asked while the block of :func:`record` ran."""

    def __init__(self, events: Sequence[Event] = ()):
        self.events: list[Event] = list(events)

    @property
    def launches(self) -> int:
        """Kernels, calls of cuBLAS and cuDNN, memsets and copies on the device."""
        return sum(event.is_launch for event in self.events)

    @property
    def kernels(self) -> list[str]:
        """Short names of the kernels and library calls in order."""
        return _short_names([e.name for e in self.events if e.kind in ("kernel", "library")])

    @property
    def syncs(self) -> list[str]:
        """The calls in which the host waited for the device."""
        return [event.name for event in self.events if event.kind == "sync"]

    @property
    def copies(self) -> list[tuple[str, int]]:
        """Direction (H2D, D2H) and bytes of each copy between host and device."""
        return [(e.name, e.size) for e in self.events if e.kind == "copy" and e.name != "D2D"]

    def within(self, part: str) -> "Log":
        """The events of which PyTorch was asked by a file with `part` in its path; needs the stacks."""
        return Log([event for event in self.events if part in event.author])

    def waits(self) -> list[str]:
        """Each wait and each copy between host and device, with the lines that asked for it."""
        found = [
            e for e in self.events if e.kind == "sync" or (e.kind == "copy" and e.name != "D2D")
        ]
        return [f"{e.name} {_where(e.stack)}".strip() for e in found]

    def __str__(self) -> str:
        """The number of launches, then the kernels by number of launches."""
        lines = [f"{self.launches} launches"]
        names = self.kernels + [
            e.kind for e in self.events if e.is_launch and e.kind[0] not in "kl"
        ]
        lines += [f"{count:6d}  {name}" for name, count in collections.Counter(names).most_common()]
        return "\n".join(lines)


def _where(stack: tuple[Frame, ...]) -> str:
    frames = [frame for frame in stack if not _IS_PYTORCH.search(frame.file)]
    return " <- ".join(f"{f.file.rsplit('/', 1)[-1]}:{f.line} {f.function}" for f in frames[:3])


_depth = 0
_stacks: list[tuple[Frame, ...]] = []


def _note_stack() -> None:
    frames, frame = [], sys._getframe().f_back
    while frame is not None:
        code = frame.f_code
        frames.append(Frame(code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    _stacks.append(tuple(frames))


_Callback = ctypes.CFUNCTYPE(None)
_on_event, _no_callback = _Callback(_note_stack), _Callback()


@contextlib.contextmanager
def record(stacks: bool = False) -> Iterator[Log]:
    """
    Records what the device is asked in the block, by any thread. Blocks may be nested.

    Args:
        stacks: also record Python's stack at each event; a nested block does so if the outermost does.
    """
    global _depth
    library, log = loaded(), Log()
    if _depth == 0:
        library.dry_gpu_clear_log()
        _stacks.clear()
        library.dry_gpu_on_event(_on_event if stacks else _no_callback)
        library.dry_gpu_record(True)
    first = len(_read_lines())
    _depth += 1
    try:
        yield log
    finally:
        _depth -= 1
        if _depth == 0:
            library.dry_gpu_record(False)
            library.dry_gpu_on_event(_no_callback)
        for number, line in enumerate(_read_lines()[first:], first):
            log.events.append(_parse(line, _stacks[number] if number < len(_stacks) else ()))


def _read_lines() -> list[str]:
    size = loaded().dry_gpu_log_size()
    text = ctypes.create_string_buffer(max(size, 1))
    loaded().dry_gpu_read_log(0, text, size)
    return text.raw[:size].decode().splitlines()


def _parse(line: str, stack: tuple[Frame, ...]) -> Event:
    kind, *rest = line.split("\t")
    name, size, grid, block = kind, 0, "", ""
    if kind == "kernel":
        name, grid, block = rest[:3]
    elif kind == "copy":
        name, size = rest[0], int(rest[1])
    elif kind in ("memset", "malloc"):
        size = int(rest[0])
    elif kind in ("library", "sync"):
        (name,) = rest
    return Event(kind, name, size, grid, block, stack)


def _short_names(names: list[str]) -> list[str]:
    """Readable names of mangled kernels: without namespaces, arguments and most template arguments."""
    unique = sorted(set(names))
    full = dict(zip(unique, unique))
    if unique and shutil.which("c++filt"):
        out = subprocess.run(["c++filt"], input="\n".join(unique), capture_output=True, text=True)
        full = dict(zip(unique, out.stdout.splitlines()))
    return [_short(full[name]) for name in names]


def _short(name: str) -> str:
    """
    `void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>(...)`
    becomes `vectorized_elementwise_kernel: CUDAFunctor_add`.
    """
    plain = re.sub(r"\(anonymous namespace\)::|\bvoid ", "", name)
    head = re.match(r"[\w:]+", plain)
    if not head:
        return name[:120]
    kernel = head[0].rsplit("::", 1)[-1]
    operations = r"(\w*(?:Functor\w*|Ops?|_kernel_cuda|_kernel_impl|_cuda_kernel))\b"
    for operation in re.findall(operations, plain[head.end() :]):
        if operation not in (kernel, "ReduceOp", "func_wrapper_t"):
            return f"{kernel}: {operation}"
    return kernel
