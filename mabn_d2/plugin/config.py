"""The options that the package adds to a Detectron2 config, and how a config is read."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..layers import options_of
from ..utils.command_line import one_line
from .registry import NORM_REGISTRY, check_norm_names, norm_options


def add_mabn_config(cfg: CfgNode) -> None:
    """
    Adds `MODEL.<NAME>` with the options of each registered norm, `MODEL.NORM_BATCH_SIZE`,
    `MODEL.WEIGHTS_IMPORT`, `SOLVER.VIRTUAL_WORKERS` and `STATISTICS`.

    What an option does stands at the class of the norm, like :class:`mabn_d2.layers.MABN2d`. What
    the config has keeps its value, so norms that are registered later come in by calling this again.
    A config of `get_cfg` has all of this once `mabn_d2` is imported.

    Raises:
        ValueError: the config has something else under the name of a norm.
    """
    for name, norm in NORM_REGISTRY:
        defaults = {option.upper(): default for option, default in options_of(norm).items()}
        if name == "MBN":
            # Whether each mini-batch is run forward once more after the optimizer's step, to renew
            # its statistics in the memory.
            defaults["DOUBLE_FORWARD"] = True
        node = cfg.MODEL.get(name, CfgNode())
        if not isinstance(node, CfgNode) or not set(node) <= set(defaults):
            raise ValueError(
                f"MODEL.{name} of the config is not for the options of the norm {name}"
            )
        cfg.MODEL[name] = CfgNode({**defaults, **node})
    # Images of a worker that a norm takes its statistics from; with 2, a norm sees 16 images as 8
    # batches of 2 in turn. 0 stands for all. Norms in RoI heads, whose batches are regions, see all.
    cfg.MODEL.setdefault("NORM_BATCH_SIZE", 0)
    # What norms do with weights of other norms: "exact", they keep the function of BN, of an affine map or of
    # no norm; "as_is", they load what has the right name; "adapt", the same, and training starts with
    # statistics of its own data. A resumed run loads what it saved.
    cfg.MODEL.setdefault("WEIGHTS_IMPORT", "exact")

    # As how many workers one process trains: each has a part of SOLVER.IMS_PER_BATCH and statistics of its own,
    # and the optimizer gets the mean of their gradients.
    cfg.SOLVER.setdefault("VIRTUAL_WORKERS", 1)

    # The ℓ2 norms of the batch statistics of norms, into metrics.json and TensorBoard.
    statistics = cfg.setdefault("STATISTICS", CfgNode())
    statistics.setdefault("ENABLED", False)
    # Patterns of names of norms, like "backbone.bottom_up.res2.*".
    statistics.setdefault("LAYERS", ["*"])
    # Every how many iterations they are recorded.
    statistics.setdefault("PERIOD", 20)


def load_config(file: str, overrides: Sequence = ()) -> CfgNode:
    """
    A config of Detectron2 or of this package; without a GPU, its model is on the CPU.

    Args:
        file: YAML.
        overrides: keys and values in turn, as on a command line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a config, a key does not exist, a value is not accepted, or a norm
            is not registered. The message is one line.
    """
    if not PathManager.isfile(file):
        raise FileNotFoundError(f"The config file {file!r} does not exist")
    cfg = get_cfg()
    add_mabn_config(cfg)
    # Of many types: wrong syntax, unknown keys, values of another type.
    try:
        cfg.merge_from_file(file)
    except Exception as error:
        raise ValueError(f"{file} is not a config of Detectron2: {one_line(error)}") from error
    try:
        cfg.merge_from_list(list(overrides))
    except Exception as error:
        raise ValueError(one_line(error)) from error
    norm_options(cfg)
    check_norm_names(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg
