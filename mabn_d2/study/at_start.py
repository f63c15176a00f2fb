"""
Evaluates the weights that a training run would start from, as it would see them before its first step.

    python -m mabn_d2.study.at_start FILE.json <the command line of tools/train_net.py>
"""

import json
import sys

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup

from ..engine import Trainer
from ..plugin import load_config
from ..plugin.command_line import add_arguments, bring_in, set_num_classes
from ..utils.files import atomic_write


def main(file: str, arguments: list[str]) -> None:
    args = add_arguments(default_argument_parser()).parse_args(arguments)
    bring_in(args)
    cfg: CfgNode = load_config(args.config_file, args.opts)
    set_num_classes(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    # It has the data that statistics are measured on where the weights hold none.
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.test(cfg, trainer.model)
    with atomic_write(file, "w") as f:  # the file says that this is done
        json.dump(results, f)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
