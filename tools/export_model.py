#!/usr/bin/env python
"""
Writes a trained detector as ONNX or TorchScript, without a norm in it.

    tools/export_model.py --config-file output/config.yaml --output model.onnx \
        MODEL.WEIGHTS output/model_final.pth

With --evaluate the file is run on DATASETS.TEST of the config, and its COCO AP is printed beside the
model's.
"""

import argparse
import sys

import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.deploy import FORMATS, ExportedDetector, export_detector
from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="export_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FILE", help="what is written")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument(
        "--evaluate", action="store_true", help="print the file's AP beside the model's"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = without_usage(add_arguments(parser)).parse_args(argv)
    if args.output.endswith(".onnx") != (args.format == "onnx"):
        parser.error(f"--output: {args.output} ends in .onnx if and only if --format is onnx")
    return args


def evaluate(cfg, models):
    """Prints the AP of several models on each data set of the config."""
    for dataset in cfg.DATASETS.TEST:
        results = {}
        for name, model in models.items():
            loader = build_detection_test_loader(cfg, dataset)
            evaluator = Trainer.build_evaluator(cfg, dataset)
            results[name] = inference_on_dataset(model, loader, evaluator)
        for task in next(iter(results.values())):
            scores = (f"{name} {result[task]['AP']:.2f}" for name, result in results.items())
            print(f"{dataset} {task} AP: {', '.join(scores)}")


def main(argv=None):
    args = parse_arguments(argv)
    with errors_in_one_line():
        bring_in(args)
        cfg = load_config(args.config_file, args.opts)
        setup_logger(name="mabn_d2")
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS is empty: the model would have random weights")
        model = Trainer.build_model(cfg).eval()
        Checkpointer(model, weights_import=cfg.MODEL.WEIGHTS_IMPORT).load(cfg.MODEL.WEIGHTS)
        size = min(cfg.INPUT.MIN_SIZE_TEST, 256)
        export_detector(model, args.output, args.format, 255 * torch.rand(3, size, size + 32))
        print(f"{args.output} is written")
        if args.evaluate:
            evaluate(cfg, {"model": model, args.output: ExportedDetector(args.output)})


if __name__ == "__main__":
    sys.exit(main())
