#!/usr/bin/env python
"""
The paper's comparison of inference: a ResNet-50 with each norm, folded and not folded.

Iterations per second, the median over the rounds with the 10th and 90th percentile. In each round the
networks run one after the other; the ratio is the median of those within a round, so that a machine
that gets slower meanwhile does not count.
"""

import argparse
import datetime
import os
import sys

# Where other work shares the cores, threads that wait actively slow everything down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from mabn_d2.benchmark.inference import benchmark_inference, format_results, make_networks
from mabn_d2.benchmark.table import device_name
from mabn_d2.utils.command_line import without_usage


def positive_integer(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmark_inference.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--batch-size", type=positive_integer, default=1, metavar="N")
    parser.add_argument("--size", type=positive_integer, default=224, metavar="PIXELS")
    parser.add_argument("--rounds", type=positive_integer, default=20, metavar="N")
    args = without_usage(parser).parse_args(argv)
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch finds no GPU")
    if args.rounds < 2:
        parser.error("--rounds: two are needed for percentiles")
    device = torch.device(args.device)
    x = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    print(
        f"torch {torch.__version__}, {args.device}: {device_name(device)}, "
        f"{torch.get_num_threads()} threads, {datetime.date.today()}, input {tuple(x.shape)}, "
        f"{args.rounds} rounds\n"
    )
    print(format_results(benchmark_inference(make_networks(), x, args.rounds)))


if __name__ == "__main__":
    sys.exit(main())
