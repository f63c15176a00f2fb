#!/usr/bin/env python
"""
The paper's comparison of inference: a network with each norm, folded and not folded.

    OMP_NUM_THREADS=1 tools/benchmark_inference.py --size 256 --csv resnet50.csv --chart resnet50.png
    OMP_NUM_THREADS=1 tools/benchmark_inference.py --model mask_rcnn --size 512 --rounds 8

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

from mabn_d2.benchmark.inference import (
    MODELS,
    PAPER,
    benchmark_inference,
    format_results,
    make_input,
    make_networks,
    write_csv,
)
from mabn_d2.benchmark.table import device_name
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


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
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
    parser.add_argument("--batch-size", type=positive_integer, default=1, metavar="N")
    parser.add_argument("--size", type=positive_integer, default=224, metavar="PIXELS")
    parser.add_argument("--rounds", type=positive_integer, default=20, metavar="N")
    parser.add_argument("--csv", metavar="FILE", help="the table as a file")
    parser.add_argument("--chart", metavar="FILE", help="*.png or *.svg")
    args = without_usage(parser).parse_args(argv)
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch finds no GPU")
    if args.rounds < 2:
        parser.error("--rounds: two are needed for percentiles")
    for file in filter(None, (args.csv, args.chart)):  # not after an hour of measurements
        if not os.path.isdir(os.path.dirname(file) or "."):
            parser.error(f"{file}: its folder does not exist")
    if args.chart and not args.chart.endswith((".png", ".svg")):
        parser.error(f"--chart: {args.chart} must end in .png or .svg")
    device = torch.device(args.device)
    x = make_input(args.model, args.batch_size, args.size, device)
    settings = {
        "model": args.model, "device": device_name(device), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "date": datetime.date.today(), "images": args.batch_size,
        "size": args.size, "rounds": args.rounds,
    }  # fmt: skip
    title = ", ".join(f"{key} {value}" for key, value in settings.items())
    print(title, end="\n\n")
    with errors_in_one_line():
        results = benchmark_inference(make_networks(args.model), x, args.rounds, device)
        paper = PAPER if args.model == "resnet50" else {}
        print(format_results(results, paper))
        if args.csv:
            write_csv(args.csv, results, settings)
        if args.chart:
            from mabn_d2.report.inference import plot_inference

            name = f"{args.model}, {args.batch_size}x3x{args.size}x{args.size}, {args.device}"
            plot_inference(results, paper, name, args.chart)


if __name__ == "__main__":
    sys.exit(main())
