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
from mabn_d2.engine import LazyTrainer, check_lazy_config, load_lazy_config
from mabn_d2.engine.resumable import check_num_workers
from mabn_d2.plugin.command_line import add_arguments, bring_in, set_lazy_num_classes


def setup(args):
    """The config of the command line's file and overrides."""
    bring_in(args)
    cfg = load_lazy_config(args.config_file, args.opts)
    set_lazy_num_classes(cfg, args)
    return cfg


def check(cfg, args):
    """
    Finds mistakes before any worker starts.

    Raises:
        ValueError, FileNotFoundError: those of `check_lazy_config`, or the run to resume does not go
            with the number of workers.
    """
    num_workers = args.num_gpus * args.num_machines
    check_lazy_config(cfg, num_workers, eval_only=args.eval_only, resume=args.resume)
    if args.resume and not args.eval_only:
        check_num_workers(cfg.train.output_dir, num_workers)


def main(args):
    cfg = setup(args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mabn_d2")
    default_setup(cfg, args)
    if cfg.train.device == "cpu":  # workers that compete for the cores wait for one another
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_world_size()))
    if args.eval_only:
        model = LazyTrainer.build_model(cfg)
        Checkpointer(model, save_dir=cfg.train.output_dir).resume_or_load(
            cfg.train.init_checkpoint, resume=args.resume
        )
        return LazyTrainer.test(cfg, model)
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = add_arguments(default_argument_parser()).parse_args()
    try:
        check(setup(args), args)
    except (ValueError, OSError) as error:
        sys.exit(f"lazyconfig_train_net.py: error: {error}")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
