#!/usr/bin/env python
"""
Draws the batch statistics that runs with STATISTICS.ENABLED have recorded.

Four panels for one norm, the runs overlaid: how far the mean, the variance and the two statistics of
the backward pass swing from iteration to iteration. The same as numbers, in a table.
"""

import argparse
import sys

from mabn_d2.report.statistics import plot_all_layers, plot_statistics, swing_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--layer", help="name of a norm; by default the first")
    parser.add_argument(
        "--all", action="store_true", help="all norms, as a sheet of small pictures"
    )
    parser.add_argument("--labels", nargs="+", default=[], help="names of the runs in the legend")
    parser.add_argument(
        "--out", default="statistics.png", help=".png or .svg (default: statistics.png)"
    )
    arguments = parser.parse_args()
    if arguments.labels and len(arguments.labels) != len(arguments.runs):
        parser.error(f"--labels: {len(arguments.runs)} names are needed, one for each run")
    if arguments.all and arguments.layer:
        parser.error("--all and --layer exclude one another")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    runs, out, labels = arguments.runs, arguments.out, arguments.labels
    try:
        if arguments.all:
            shown = f"{plot_all_layers(runs, out, labels)} norms"
        else:
            shown = plot_statistics(runs, out, arguments.layer, labels)
        table = swing_table(runs, None if arguments.all else shown, labels)
    except (ValueError, OSError, ImportError) as error:
        print(f"plot_statistics.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{out}: {shown}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
