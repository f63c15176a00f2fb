#!/usr/bin/env python
"""
Trains and evaluates models that a LazyConfig describes: classifiers and detectors.

Takes the options of Detectron2's own `tools/lazyconfig_train_net.py`. On a machine without a GPU,
`--num-gpus N` starts N workers on the CPU.
"""

import sys

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.engine import LazyTrainer, load_lazy_config, preflight
from mabn_d2.plugin.command_line import add_arguments, bring_in, set_lazy_num_classes
from mabn_d2.utils.command_line import errors_in_one_line, without_usage


def setup(args):
    """The config of the command line's file and overrides."""
    bring_in(args)
    cfg = load_lazy_config(args.config_file, args.opts)
    set_lazy_num_classes(cfg, args)
    return cfg


def main(args):
    cfg = setup(args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mabn_d2")
    default_setup(cfg, args)
    if cfg.train.device == "cpu":  # workers that compete for the cores wait for one another
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_world_size()))
    if args.eval_only:
        model = LazyTrainer.build_model(cfg)
        how = cfg.train.weights_import
        checkpointer = Checkpointer(model, cfg.train.output_dir, weights_import=how)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        checkpointer.log_evaluation_only()
        return LazyTrainer.test(cfg, model)
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = without_usage(add_arguments(default_argument_parser())).parse_args()
    with errors_in_one_line():
        for warning in preflight.check_lazy(setup(args), args):
            print(f"lazyconfig_train_net.py: warning: {warning}", file=sys.stderr)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
