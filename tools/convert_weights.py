#!/usr/bin/env python
"""
Converts weights of other code bases into a file that Detectron2 loads.

Prints what matched, what was left over, and the lines of a config that go with the weights.
"""

import argparse
import sys

from mabn_d2.checkpoint import (
    SOURCES,
    as_norm,
    check_destination,
    config_lines,
    describe,
    load_weights,
    match_model,
    save_weights,
)
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.utils.command_line import without_usage


def parse_arguments() -> argparse.Namespace:
    parser = without_usage(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("src", metavar="SRC", help="file to read: .pth, or .pkl of Detectron2")
    parser.add_argument("dst", metavar="DST", help="file to write, a new .pth")
    parser.add_argument(
        "--from", required=True, choices=SOURCES, dest="source", help="what wrote SRC"
    )
    parser.add_argument(
        "--norm",
        choices=["MABN", "BN"],
        help="write weights of this norm that have the function of those of the other; BN is FrozenBN, too",
    )
    parser.add_argument(
        "--eps",
        type=float,
        help="ε of SRC's BN, which no file holds; by default 1e-5, and 0 for torchvision's detectors",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="also compare with the model of this config"
    )
    return add_arguments(parser).parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        check_destination(arguments.dst)
        bring_in(arguments)
        weights = load_weights(arguments.src, arguments.source, arguments.eps)
        if arguments.norm:
            weights = as_norm(weights, arguments.src, arguments.norm)
        match = None
        if arguments.config_file:
            cfg = load_config(arguments.config_file, ["MODEL.DEVICE", "cpu"])
            match = match_model(weights, cfg)
        save_weights(weights, arguments.dst)
    except (ValueError, KeyError, AssertionError, OSError) as error:
        print(f"convert_weights.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{arguments.src} -> {arguments.dst}")
    print(describe(weights, match, arguments.config_file))
    print(f"\nconfig:\n{config_lines(weights, arguments.dst)}")
    if not weights.config:
        print("and the other options of the config that the weights were trained with")
    for note in weights.notes:
        print(f"\nNote: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
