"""Time and memory of a forward and backward pass."""

import gc
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..layers import BRN2d, MABN2d, MBN2d
from ..surgery import set_norm_batch_size
from .shapes import Shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
STEADY_ITERATION = 5000  # past every warm-up of MABN
WARMUP_RUNS = 2
IDEAL_PASSES = 8  # reads and writes of a tensor of x's size, see the module's docstring
QUEUED_CYCLES = 20_000_000  # about 10 ms of a GPU's clock, longer than any norm's launches take


class Settings(NamedTuple):
    """How to measure."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    runs: int = 10
    queued: bool = False


class Row(NamedTuple):
    """Measurements of a norm on a shape. Times in milliseconds, one per round."""

    shape: Shape
    norm: str
    times: list[float]
    x_bytes: int
    peak_bytes: int
    saved_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.times)


class SyncBN(nn.SyncBatchNorm):
    """In a world of size 1 `nn.SyncBatchNorm` falls back to BN's kernels; this one does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.modules._functions.SyncBatchNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            self.eps, self.momentum, dist.group.WORLD, 1,
        )  # fmt: skip


def load_reference(path: str) -> Callable[[int], nn.Module]:
    """
    The norm of the file at `path`, as a function of the number of channels.

    Raises:
        ValueError: the file does not offer what is expected.
    """
    expected = "expected a class MABN2d, constructed as MABN2d(channels, B=2, real_B=32)"
    try:
        spec: Any = importlib.util.spec_from_file_location("mabn_reference", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.MABN2d(32, B=2, real_B=32)
    except FileNotFoundError as error:
        raise ValueError(f"--reference: no such file: {path}") from error
    except Exception as error:  # it is foreign code, anything can happen
        raise ValueError(f"--reference: {path}: {expected}; {error!r}") from error
    return lambda channels: module.MABN2d(channels, B=2, real_B=32)


def make_norms(
    device: torch.device, reference: str | None = None, norm_batch_size: int = 0
) -> dict[str, Callable[[int], nn.Module]]:
    """The norms to compare, as functions of the number of channels."""
    norms: dict[str, Callable[[int], nn.Module]] = {
        "BN": nn.BatchNorm2d,
        "MABN": MABN2d,
        "MBN": MBN2d,
        "BRN": BRN2d,
        "GN": lambda channels: nn.GroupNorm(32, channels),
    }
    if norm_batch_size:
        for name in ("BN", "MABN", "MBN", "BRN"):
            norms[f"{name}({norm_batch_size})"] = in_groups(norms[name], norm_batch_size)
    if device.type == "cuda":
        norms["SyncBN"] = SyncBN
    if reference is not None:
        norms["reference"] = load_reference(reference)
    return norms


def in_groups(make_norm: Callable[[int], nn.Module], size: int) -> Callable[[int], nn.Module]:
    """The norm with normalization batches of `size` images."""

    def make(channels: int) -> nn.Module:
        norm = make_norm(channels)
        set_norm_batch_size(norm, size)
        return norm

    return make


def settle(norm: nn.Module) -> None:
    """Puts a norm into its steady state: late in training, with no statistic at zero."""
    for buffer in norm.buffers():
        buffer.fill_(1 if buffer.is_floating_point() else STEADY_ITERATION)


def make_step(
    norm: nn.Module, x: torch.Tensor, upstream: torch.Tensor, settings: Settings
) -> Callable[[], None]:
    """A function that runs the forward and the backward pass once. It is warmed up."""
    settle(norm.to(settings.device).train())
    inputs = [x, *norm.parameters()]
    mixed = settings.dtype != torch.float32
    autocast_dtype = settings.dtype if mixed else None

    def forward() -> torch.Tensor:
        with torch.autocast(settings.device.type, autocast_dtype, enabled=mixed):
            return norm(x)

    # Under autocast some norms return float32, which is then the type of the gradient, too.
    upstream = upstream.to(forward().dtype)

    def step() -> None:
        torch.autograd.grad(forward(), inputs, upstream)

    for _ in range(WARMUP_RUNS):
        step()
    return step


def time_once(function: Callable[[], Any], settings: Settings) -> float:
    """Milliseconds that one call takes."""
    if settings.device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if settings.queued:
        torch.cuda._sleep(QUEUED_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that exist at a time during a call, beyond those before it."""
    if device.type == "cuda":
        gc.collect()  # what is freed during the call would be missing from the difference
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def make_inputs(shape: Shape, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the upstream gradient, both standard normal."""
    x, upstream = (
        torch.randn(shape.size, device=settings.device)
        .to(settings.dtype)
        .contiguous(memory_format=settings.memory_format)
        for _ in range(2)
    )
    return x.requires_grad_(), upstream


def copy_bandwidth(shapes: list[Shape], settings: Settings) -> float:
    """Bytes read and written in a millisecond by a copy of the largest input."""
    x, target = make_inputs(max(shapes, key=lambda shape: math.prod(shape.size)), settings)
    times = [
        time_once(lambda: target.copy_(x.detach()), settings)
        for _ in range(settings.runs + WARMUP_RUNS)
    ]
    return 2 * x.numel() * x.element_size() / statistics.median(times[WARMUP_RUNS:])


def measure(shape: Shape, norms: dict[str, Callable], settings: Settings) -> list[Row]:
    """
    One row per norm.

    A norm that cannot run, as for lack of memory or of a kernel for the data type, is left out
    with a line on stderr.
    """
    x, upstream = make_inputs(shape, settings)
    steps = {}
    for name, make_norm in norms.items():
        try:
            steps[name] = make_step(make_norm(shape.size[1]), x, upstream, settings)
        except RuntimeError as error:
            print(f"left out: {name} on {shape.name}: {first_line(error)}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings.runs):
        for name, step in steps.items():
            times[name].append(time_once(step, settings))
    return [
        Row(
            shape,
            name,
            times[name],
            x.numel() * x.element_size(),
            peak_bytes(step, settings.device),
            saved_bytes(step),
        )
        for name, step in steps.items()
    ]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def benchmark(
    shapes: list[Shape], norms: dict[str, Callable[[int], nn.Module]], settings: Settings
) -> Iterator[list[Row]]:
    """
    Measures every norm on every shape.

    Args:
        shapes: inputs of the norms.
        norms: name to a function that makes the norm for a number of channels.
        settings: how to measure.

    Yields:
        the rows of one shape, one per norm.
    """
    for shape in shapes:
        yield measure(shape, norms, settings)
