#!/usr/bin/env python
"""
Draws what a detector finds.

    tools/demo.py --config-file output/config.yaml --input photos more/*.jpg --output drawn \
        MODEL.WEIGHTS output/model_final.pth
    tools/demo.py --config-file output/config.yaml --exported model.onnx --input clip.mp4 --output drawn.mp4
    tools/demo.py --config-file output/config.yaml --exported model.onnx --webcam 0 --window
    tools/demo.py --config-file output/config.yaml --exported model.onnx --compare shapes_val --output panels.png

The model is folded: no norm is left in it. The classes have the names of the first data set of DATASETS.TEST.
"""

import argparse
import sys

from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from mabn_d2.deploy import Predictor, draw, metadata_of
from mabn_d2.deploy.inputs import ImageFiles, Video, open_inputs
from mabn_d2.deploy.outputs import PictureFiles, VideoFile, Window, refuse_existing
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.report import draw_comparison
from mabn_d2.report.run import describe_model
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, folders, patterns; or one video"
    )
    source.add_argument("--webcam", type=int, metavar="N", help="number of a camera")
    source.add_argument(
        "--compare", metavar="DATASET", help="draw some of its images beside their ground truth"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="PATH", help="folder of pictures, picture or video")
    target.add_argument("--window", action="store_true", help="show on the screen; q ends")
    parser.add_argument("--exported", metavar="FILE", help="of tools/export_model.py, as the model")
    parser.add_argument("--score", type=float, default=0.5, help="least score drawn; default: 0.5")
    parser.add_argument("--images", type=int, default=6, help="of --compare; default: 6")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = without_usage(add_arguments(parser)).parse_args(argv)
    if args.compare and args.window:
        parser.error("--compare is drawn into a file: --output FILE")
    if args.exported and "MODEL.WEIGHTS" in args.opts:
        parser.error("--exported and MODEL.WEIGHTS: only one of the two is the model")
    return args


def compare(cfg, args):
    refuse_existing(args.output)
    predictor = Predictor(cfg, args.exported)
    with tqdm(total=args.images, unit="image", disable=None) as bar:

        def detect(record):
            bar.update()
            return predictor(read_image(record["file_name"], "BGR"))["instances"]

        title = describe_model(cfg)
        draw_comparison(args.compare, detect, args.output, title, args.images, args.score)
    print(f"{args.output} is written")


def predict(cfg, args):
    source = Video(args.webcam) if args.webcam is not None else open_inputs(args.input)
    if args.window:
        target = Window("demo.py", wait=isinstance(source, ImageFiles))
    elif isinstance(source, ImageFiles):
        target = PictureFiles(args.output, source.paths)
    else:
        target = VideoFile(args.output, source.frames_per_second)
    predictor, metadata = Predictor(cfg, args.exported), metadata_of(cfg)
    total = len(source) or None
    try:
        with target:
            for name, image in tqdm(source, total=total, unit="image", disable=None):
                if not target.write(name, draw(image, predictor(image), metadata, args.score)):
                    break
    finally:
        of = f" of {total}" if total else ""
        print(f"{target.count}{of} images are drawn into {target.name}")


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with errors_in_one_line():
            bring_in(args)
            cfg = load_config(args.config_file, args.opts)
            setup_logger(name="mabn_d2")
            (compare if args.compare else predict)(cfg, args)
    except KeyboardInterrupt:
        print("demo.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
