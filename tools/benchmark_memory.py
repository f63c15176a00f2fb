#!/usr/bin/env python
"""
Peak memory of training Mask R-CNN R50-FPN with each norm, on images of 800x1333 pixels.

On a GPU it is measured. Without one it is counted by PyTorch's own allocator on the dry GPU:

    python -m tests.dry_gpu run --compute-no-maps tools/benchmark_memory.py

Allocated is what tensors take, reserved what the allocator asks of the device. CUDA's context and cuDNN's
workspaces are in neither when it is counted; 12 GiB are taken to suffice for 11 GiB reserved.
"""

import argparse
import sys
from pathlib import Path

import torch

from mabn_d2.benchmark.memory import HEADER, format_peak, measure_peak, write_csv
from mabn_d2.benchmark.training import CONFIGS

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "COCO-InstanceSegmentation"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--amp", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2], help="per step")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmark_memory.py: error: no GPU; see --help for the way without one")
    device = torch.cuda.get_device_name()
    print(
        f"{device}, PyTorch {torch.__version__}: {'counted' if device == 'Dry GPU' else 'measured'}"
    )
    print(HEADER)
    peaks = []
    for norm in arguments.norms:
        for amp in arguments.amp:
            for images in arguments.images:
                peaks.append(measure_peak(norm, FOLDER / CONFIGS[norm], amp == "on", images))
                print(format_peak(peaks[-1]), flush=True)
                if arguments.output:
                    write_csv(arguments.output, peaks)


if __name__ == "__main__":
    main()
