#!/usr/bin/env python
"""
Draws what a training run has learned: curves of its losses and AP, and detections.

Writes curves.png and predictions.png into the run's output folder, and prints the AP of its last
evaluation and the share of the objects that it has found.
"""

import argparse
import os
import sys

from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.report import METRICS, ap_table, draw_predictions, found_sentence, plot_curves
from mabn_d2.utils.command_line import without_usage


def parse_arguments() -> argparse.Namespace:
    parser = without_usage(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output folder of the run")
    parser.add_argument(
        "--images", type=int, default=6, metavar="N", help="images in predictions.png (default: 6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    return add_arguments(parser).parse_args()


def main() -> int:
    arguments = parse_arguments()
    metrics_file, curves, predictions = (
        os.path.join(arguments.output_dir, name)
        for name in (METRICS, "curves.png", "predictions.png")
    )
    try:
        bring_in(arguments)
        table, found = ap_table(metrics_file), found_sentence(arguments.output_dir)
        plot_curves(metrics_file, curves)
        draw_predictions(arguments.output_dir, predictions, arguments.images, arguments.seed)
    except (ValueError, OSError, ImportError) as error:
        print(f"report.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{table}\n\n{found}")
    print(f"\nCurves: {curves}\nPredictions: {predictions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
