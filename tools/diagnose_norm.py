#!/usr/bin/env python
"""
Says how noisy the batch statistics of a model's norms are on your data, and which norm that speaks for.

    tools/diagnose_norm.py --config-file FILE [KEY VALUE ...]

Runs some hundred steps at fixed weights, those of MODEL.WEIGHTS or random ones, with the images per
worker of the config, and writes diagnosis.json and diagnosis.png into its output folder. A LazyConfig
(FILE.py) takes overrides of the form key=value. docs/statistics.md says what the numbers are.
"""

import argparse
import json
import os
import sys

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.engine import LazyTrainer, Trainer, load_lazy_config
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import (
    add_arguments,
    bring_in,
    set_lazy_num_classes,
    set_num_classes,
)
from mabn_d2.plugin.scaling import scale_lazy_config
from mabn_d2.report.diagnosis import plot_diagnosis
from mabn_d2.statistics import advise, diagnose
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="diagnose_norm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML or LazyConfig")
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="over which noise is measured (100)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="by default the config's output folder")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return without_usage(add_arguments(parser)).parse_args(argv)


def build(args):
    """The model with its weights, in training mode, the loader, the seed and the output folder."""
    if args.config_file.endswith(".py"):
        cfg = load_lazy_config(args.config_file, args.opts)
        set_lazy_num_classes(cfg, args)
        cfg, trainer = scale_lazy_config(cfg, 1), LazyTrainer
        options = cfg.train
        weights, how = options.init_checkpoint, options.weights_import
        seed, folder = options.seed, options.output_dir
    else:
        cfg = load_config(args.config_file, args.opts)
        set_num_classes(cfg, args)
        cfg, trainer = DefaultTrainer.auto_scale_workers(cfg, 1), Trainer
        weights, how = cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_IMPORT
        seed, folder = cfg.SEED, cfg.OUTPUT_DIR
    torch.manual_seed(max(seed, 0))
    model = trainer.build_model(cfg)
    Checkpointer(model, weights_import=how).load(weights)
    loader = trainer.build_train_loader(cfg)
    if hasattr(loader, "seed"):
        loader.seed = max(seed, 0)
    return model.train(), loader, args.out or folder


def main(argv=None):
    args = parse_arguments(argv)
    with errors_in_one_line():
        bring_in(args)
        setup_logger(name="mabn_d2")
        model, loader, folder = build(args)
        with EventStorage():  # what the model logs
            diagnosis = diagnose(model, loader, args.steps)
        advice = advise(diagnosis)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "diagnosis")
        with open(f"{path}.json", "w") as f:
            content = {**diagnosis.as_dict(), "advice": advice._asdict()}
            content["advice"]["thresholds"] = advice.thresholds._asdict()
            json.dump(content, f, indent=1)
        plot_diagnosis(diagnosis, advice, f"{path}.png")
    print(diagnosis.table())
    print(
        f"\nLoss: {diagnosis.loss_train:.4f} as in training, {diagnosis.loss_eval:.4f} with population "
        f"statistics\n{path}.json, {path}.png\n\n{advice.sentence}"
    )


if __name__ == "__main__":
    sys.exit(main())
