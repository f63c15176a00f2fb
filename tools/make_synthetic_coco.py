#!/usr/bin/env python
"""Makes a synthetic COCO-format data set, for training and evaluation without a download."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from mabn_d2.data import make_synthetic_coco
from mabn_d2.data.synthetic import LAYOUTS, VARIETIES
from mabn_d2.utils.command_line import without_usage

NAMES = {
    "shapes": "{folder}_train, {folder}_val (after mabn_d2.data.register_shapes())",
    "coco2017": "coco_2017_train, coco_2017_val, keypoints_coco_2017_{train,val},"
    " coco_2017_{train,val}_panoptic_separated",
}


def parse_arguments() -> argparse.Namespace:
    parser = without_usage(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
    )
    parser.add_argument("out", metavar="OUT", help="folder to create the data set in")
    parser.add_argument("--layout", default="shapes", help=" or ".join(LAYOUTS))
    parser.add_argument("--train", type=int, default=1000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    sizes = ", ".join(f"{layout.size} for {name}" for name, layout in LAYOUTS.items())
    parser.add_argument("--size", type=int, help=f"short side in pixels; by default {sizes}")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument(
        "--variety",
        default="looks",
        help="how images differ from one another: " + " or ".join(VARIETIES),
    )
    parser.add_argument("--workers", type=int, default=1, help="number of processes that draw")
    return parser.parse_args()


def describe(root: Path) -> str:
    """One line per split: its images and annotations, as the files on disk have them."""
    lines = []
    for path in sorted((root / "annotations").glob("instances_*.json")):
        content = json.loads(path.read_text())
        images, annotations = len(content["images"]), len(content["annotations"])
        lines.append(f"{path}: {images} images, {annotations} annotations")
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    try:
        root = make_synthetic_coco(**vars(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"make_synthetic_coco.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_synthetic_coco.py: interrupted, nothing is left behind", file=sys.stderr)
        return 130
    print(describe(root))
    print("Detectron2 data sets:", NAMES[arguments.layout].replace("{folder}", root.name))
    print(f"Use them with: export DETECTRON2_DATASETS={shlex.quote(str(root.parent.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
