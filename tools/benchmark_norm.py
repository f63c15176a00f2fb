#!/usr/bin/env python
"""
Times MABN, MBN, BN, BRN, GN and SyncBN on the inputs that the norms of a Mask R-CNN R50-FPN see.

The shapes are those of one training step with 2 images of 800x1333 pixels, padded to 800x1344, and
a norm in the backbone, FPN, the box head and the mask head. With --shapes resnet50 they are those
of a ResNet-50 with 32 images of 224x224.

With --norm-batch-size B, each norm with batch statistics runs a second time, under the name
"BN(B)", on groups of B images.

Time: one forward and backward pass, median and 10th..90th percentile over the rounds. Within a
round the norms run one after the other; "/BN" is the median of the ratios within a round, so that
a machine that gets slower meanwhile does not count. MABN is in its steady state: the moving
averages and the renormalization are active. On CUDA a pass includes the launches of its kernels;
with --queued the device works off a backlog first, so that only the kernels count, as in a
training whose host runs ahead.

%copy: share of the device's copy bandwidth that an ideal norm would use in the same time. It reads
x twice and writes once in the forward pass, and reads x and the upstream gradient twice and writes
once in the backward pass: 8 times the bytes of x. The copy bandwidth is measured at the start, on
the largest shape of the run. Inputs that stay in a cache can exceed 100 %.

Peak memory: of the tensors that one forward and backward pass allocates: output, gradients and
temporaries, without the input and the upstream gradient. On CUDA it is the allocator's
`max_memory_allocated`, on the CPU the profiler's account of the allocator.

Saved: bytes kept from forward to backward, beyond those of the input x.

SyncBN is PyTorch's, with communication in a world of size 1, on CUDA only. Half precision is
measured under autocast, as in mixed-precision training: parameters and statistics are float32.
"""
import argparse
import csv
import datetime
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

# Else the profiler reports on stderr its stages, and what is freed but was not allocated under it.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Where other work shares the cores, threads that wait actively can make a small norm 10 x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mabn_d2 import BRN2d, MABN2d, MBN2d
from mabn_d2.surgery import set_norm_batch_size


class Shape(NamedTuple):
    """Input of some of the model's norms: (N, C, H, W) and how many of its norms have it."""

    name: str
    size: Tuple[int, int, int, int]
    norms: int
    quick: bool = False  # whether it is part of the quick run


SHAPES = [
    Shape("stem", (2, 64, 400, 672), 1),
    Shape("res2 inner", (2, 64, 200, 336), 6, quick=True),
    Shape("res2 out, FPN", (2, 256, 200, 336), 6),
    Shape("res3 inner", (2, 128, 100, 168), 8, quick=True),
    Shape("res3 out", (2, 512, 100, 168), 5),
    Shape("FPN stride 8", (2, 256, 100, 168), 2),
    Shape("res4 inner, FPN", (2, 256, 50, 84), 14, quick=True),
    Shape("res4 out", (2, 1024, 50, 84), 7),
    Shape("res5 inner", (2, 512, 25, 42), 6, quick=True),
    Shape("res5 out", (2, 2048, 25, 42), 4),
    Shape("FPN stride 32", (2, 256, 25, 42), 2),
    Shape("box head", (1024, 256, 7, 7), 4, quick=True),
    Shape("mask head", (256, 256, 14, 14), 4, quick=True),
]
SHAPES_RESNET50 = [
    Shape("stem", (32, 64, 112, 112), 1),
    Shape("res2 inner", (32, 64, 56, 56), 6),
    Shape("res2 out", (32, 256, 56, 56), 4),
    Shape("res3 first", (32, 128, 56, 56), 1),
    Shape("res3 inner", (32, 128, 28, 28), 7),
    Shape("res3 out", (32, 512, 28, 28), 5),
    Shape("res4 first", (32, 256, 28, 28), 1),
    Shape("res4 inner", (32, 256, 14, 14), 11),
    Shape("res4 out", (32, 1024, 14, 14), 7),
    Shape("res5 first", (32, 512, 14, 14), 1),
    Shape("res5 inner", (32, 512, 7, 7), 5),
    Shape("res5 out", (32, 2048, 7, 7), 4),
]
CHOICES_OF_SHAPES = {
    "all": SHAPES,
    "quick": [shape for shape in SHAPES if shape.quick],
    "resnet50": SHAPES_RESNET50,
}
PAIRS = [  # whose ratios the summary has
    ("MABN", "BN"),
    ("MBN", "BN"),
    ("BRN", "BN"),
    ("GN", "BN"),
    ("SyncBN", "BN"),
    ("reference", "BN"),
    ("reference", "MABN"),
]
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
    times: List[float]
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
        spec = importlib.util.spec_from_file_location("mabn_reference", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.MABN2d(32, B=2, real_B=32)
    except FileNotFoundError as error:
        raise ValueError(f"--reference: no such file: {path}") from error
    except Exception as error:  # it is foreign code, anything can happen
        raise ValueError(f"--reference: {path}: {expected}; {error!r}") from error
    return lambda channels: module.MABN2d(channels, B=2, real_B=32)


def make_norms(
    device: torch.device, reference: Optional[str] = None, norm_batch_size: int = 0
) -> Dict[str, Callable[[int], nn.Module]]:
    """The norms to compare, as functions of the number of channels."""
    norms = {
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
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if settings.queued:
        torch.cuda._sleep(QUEUED_CYCLES)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that exist at a time during a call, beyond those before it."""
    if device.type == "cuda":
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


def make_inputs(shape: Shape, settings: Settings) -> Tuple[torch.Tensor, torch.Tensor]:
    """x and the upstream gradient, both standard normal."""
    x, upstream = (
        torch.randn(shape.size, device=settings.device)
        .to(settings.dtype)
        .contiguous(memory_format=settings.memory_format)
        for _ in range(2)
    )
    return x.requires_grad_(), upstream


def copy_bandwidth(shapes: List[Shape], settings: Settings) -> float:
    """Bytes read and written in a millisecond by a copy of the largest input."""
    x, target = make_inputs(max(shapes, key=lambda shape: math.prod(shape.size)), settings)
    times = [
        time_once(lambda: target.copy_(x.detach()), settings)
        for _ in range(settings.runs + WARMUP_RUNS)
    ]
    return 2 * x.numel() * x.element_size() / statistics.median(times[WARMUP_RUNS:])


def measure(shape: Shape, norms: Dict[str, Callable], settings: Settings) -> List[Row]:
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
    times = {name: [] for name in steps}
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
    shapes: List[Shape], norms: Dict[str, Callable[[int], nn.Module]], settings: Settings
) -> Iterator[List[Row]]:
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


def ratio(row: Row, other: Row) -> float:
    """How many times longer `row` takes than `other`: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(row.times, other.times))


HEADER = (
    f"{'shape':<16}{'N x C x H x W':<18}{'norms':>5}  {'norm':<10}{'median ms':>10}"
    f"{'p10':>9}{'p90':>9}{'/BN':>7}{'%copy':>7}{'peak MiB':>10}{'peak/x':>8}{'saved':>16}"
)


def format_row(row: Row, bn: Optional[Row], bandwidth: float) -> str:
    """A line of the table; `bandwidth` is the device's, in bytes per millisecond."""
    low, high = np.percentile(row.times, [10, 90])
    size = "x".join(map(str, row.shape.size))
    share = IDEAL_PASSES * row.x_bytes / row.median / bandwidth
    to_bn = ratio(row, bn) if bn else math.nan
    beyond_x = (row.saved_bytes - row.x_bytes) / 2**10
    saved = f"x {beyond_x:+.1f} KiB"
    return (
        f"{row.shape.name:<16}{size:<18}{row.shape.norms:>5}  {row.norm:<10}{row.median:>10.3f}"
        f"{low:>9.3f}{high:>9.3f}{to_bn:>7.2f}{100 * share:>7.0f}"
        f"{row.peak_bytes / 2**20:>10.2f}{row.peak_bytes / row.x_bytes:>8.2f}{saved:>16}"
    )


def summarize(rows: List[Row]) -> str:
    """The ratios over all shapes, and the time of all norms of a training step."""
    table = {(row.norm, row.shape): row for row in rows}
    lines = [f"{'':<18}{'geometric mean':>15}{'of step time':>14}"]
    in_groups = [(row.norm, row.norm.split("(")[0]) for row in rows if "(" in row.norm]
    for name, other in [*PAIRS, *dict.fromkeys(in_groups)]:
        shapes = [row.shape for row in rows if row.norm == name and (other, row.shape) in table]
        if not shapes:
            continue
        pairs = [(table[name, shape], table[other, shape]) for shape in shapes]
        mean = statistics.geometric_mean(ratio(a, b) for a, b in pairs)
        weighted = step_time(a for a, _ in pairs) / step_time(b for _, b in pairs)
        lines.append(f"{name + ' / ' + other:<18}{mean:>15.3f}{weighted:>14.3f}")
    count = sum(shape.norms for shape in {row.shape for row in rows})
    lines.append(f"\nstep time of these {count} norms, forward and backward, in ms:")
    for name in dict.fromkeys(row.norm for row in rows):
        total = step_time(row for row in rows if row.norm == name)
        lines.append(f"{name:<18}{total:>15.1f}")
    return "\n".join(lines)


def step_time(rows: Iterator[Row]) -> float:
    """Milliseconds of all norms that have these shapes."""
    return sum(row.shape.norms * row.median for row in rows)


def write_csv(path: Path, rows: List[Row]) -> None:
    """Writes the measurements. An interruption leaves no half-written file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["shape", "n", "c", "h", "w", "norms", "norm", "median_ms", "p10_ms", "p90_ms"]
                + ["x_bytes", "peak_bytes", "saved_bytes"]
            )
            for row in rows:
                times = [row.median, *np.percentile(row.times, [10, 90])]
                writer.writerow(
                    [row.shape.name, *row.shape.size, row.shape.norms, row.norm]
                    + [f"{value:.6f}" for value in times]
                    + [row.x_bytes, row.peak_bytes, row.saved_bytes]
                )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_integer(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="benchmark_norm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default CUDA if present")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the input")
    parser.add_argument("--memory-format", choices=MEMORY_FORMATS, default="contiguous")
    parser.add_argument(
        "--shapes", choices=CHOICES_OF_SHAPES, help="by default all on CUDA, quick on the CPU"
    )
    parser.add_argument(
        "--runs", type=positive_integer, default=10, metavar="N", help="rounds (default: 10)"
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="on the CPU")
    parser.add_argument(
        "--norm-batch-size", type=positive_integer, default=0, metavar="B",
        help="also time the norms on groups of B images",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument(
        "--queued", action="store_true", help="time the kernels without their launches (CUDA)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="writes the raw medians")
    parser.add_argument(
        "--reference",
        metavar="FILE.py",
        help="another implementation: a class MABN2d, constructed as"
        " MABN2d(channels, B=2, real_B=32)",
    )
    return parser


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    arguments.device = torch.device(arguments.device or ("cuda" if has_cuda else "cpu"))
    on_cuda = arguments.device.type == "cuda"
    if on_cuda and not has_cuda:
        parser.error("--device cuda: PyTorch finds no GPU")
    if arguments.queued and not on_cuda:
        parser.error("--queued is for CUDA")
    if arguments.csv and (arguments.csv.is_dir() or not arguments.csv.parent.is_dir()):
        parser.error(f"--csv: cannot write {arguments.csv}")
    arguments.shapes = arguments.shapes or ("all" if on_cuda else "quick")
    try:
        arguments.norms = make_norms(
            arguments.device, arguments.reference, arguments.norm_batch_size
        )
    except ValueError as error:
        parser.error(first_line(error))
    return arguments


def describe(arguments: argparse.Namespace, bandwidth: float) -> str:
    """The conditions of the run, one a line."""
    conditions = {
        "torch": torch.__version__,
        "device": f"{arguments.device.type}: {device_name(arguments.device)}",
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "memory format": arguments.memory_format,
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "seed": arguments.seed,
        "rounds": arguments.runs,
        "copy bandwidth": f"{bandwidth / 1e6:.1f} GB/s",
    }
    if arguments.queued:
        conditions["launches"] = "not timed"
    return "\n".join(f"{key + ':':<16}{value}" for key, value in conditions.items())


def run(arguments: argparse.Namespace) -> None:
    """Measures, and prints the table as it grows."""
    settings = Settings(
        arguments.device,
        DTYPES[arguments.dtype],
        MEMORY_FORMATS[arguments.memory_format],
        arguments.runs,
        arguments.queued,
    )
    shapes = CHOICES_OF_SHAPES[arguments.shapes]
    bandwidth = copy_bandwidth(shapes, settings)
    print(describe(arguments, bandwidth))
    if arguments.device.type != "cuda":
        print("SyncBN is left out: PyTorch has it on CUDA only")
    print(f"\n{HEADER}", flush=True)
    rows = []
    for group in benchmark(shapes, arguments.norms, settings):
        bn = next((row for row in group if row.norm == "BN"), None)
        for row in group:
            print(format_row(row, bn, bandwidth), flush=True)
        rows += group
    print(f"\n{summarize(rows)}")
    if arguments.csv:
        write_csv(arguments.csv, rows)


def main(argv: Optional[List[str]] = None) -> int:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "SyncBN" in arguments.norms:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("benchmark_norm.py: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"benchmark_norm.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
