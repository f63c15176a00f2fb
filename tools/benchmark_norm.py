#!/usr/bin/env python
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
import datetime
import os
import sys
from pathlib import Path

# Else the profiler reports on stderr its stages, and what is freed but was not allocated under it.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Where other work shares the cores, threads that wait actively can make a small norm 10 x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist

from mabn_d2.benchmark.measure import (
    DTYPES,
    MEMORY_FORMATS,
    Settings,
    benchmark,
    copy_bandwidth,
    first_line,
    make_norms,
)
from mabn_d2.benchmark.shapes import CHOICES_OF_SHAPES
from mabn_d2.benchmark.table import HEADER, device_name, format_row, summarize, write_csv
from mabn_d2.utils.command_line import without_usage


def positive_integer(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    return without_usage(parser)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
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


def main(argv: list[str] | None = None) -> int:
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
