#!/usr/bin/env python
"""
Trains and evaluates detection models with the norms of this package.

Takes the options of Detectron2's own `tools/train_net.py`. On a machine without a GPU,
`--num-gpus N` starts N workers on the CPU.
"""

import sys

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.engine import Trainer, preflight
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in, set_num_classes
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def setup(args):
    """The frozen config of the command line's file and options."""
    bring_in(args)
    cfg = load_config(args.config_file, args.opts)
    set_num_classes(cfg, args)
    cfg.freeze()
    return cfg


def main(args):
    cfg = setup(args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mabn_d2")
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":  # workers that compete for the cores wait for one another
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_world_size()))
    if args.eval_only:
        model = Trainer.build_model(cfg)
        how = cfg.MODEL.WEIGHTS_IMPORT
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, weights_import=how)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        checkpointer.log_evaluation_only()
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_augmentation(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = without_usage(add_arguments(default_argument_parser())).parse_args()
    with errors_in_one_line():
        for warning in preflight.check(setup(args), args):
            print(f"train_net.py: warning: {warning}", file=sys.stderr)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
