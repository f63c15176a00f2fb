"""The options that the package adds to a Detectron2 config."""

import yaml
from detectron2.config import CfgNode, get_cfg

from ..layers import options_of
from .registry import NORM_REGISTRY


def add_mabn_config(cfg: CfgNode) -> None:
    """
    Adds `MODEL.<NAME>` with the options of each registered norm, and `MODEL.NORM_BATCH_SIZE`.

    What an option does stands at the class of the norm, like :class:`mabn_d2.layers.MABN2d`.
    """
    for name, norm in NORM_REGISTRY:
        cfg.MODEL[name] = CfgNode(
            {option.upper(): default for option, default in options_of(norm).items()}
        )
    # Whether each mini-batch is run forward once more after the optimizer's step, to renew its
    # statistics in the memory.
    cfg.MODEL.MBN.DOUBLE_FORWARD = True
    # Images of a worker that a norm takes its statistics from; with 2, a norm sees 16 images as 8
    # batches of 2 in turn. 0 stands for all. Norms in RoI heads, whose batches are regions, see all.
    cfg.MODEL.NORM_BATCH_SIZE = 0

    # The ℓ2 norms of the batch statistics of norms, into metrics.json and TensorBoard.
    cfg.STATISTICS = CfgNode()
    cfg.STATISTICS.ENABLED = False
    # Patterns of names of norms, like "backbone.bottom_up.res2.*".
    cfg.STATISTICS.LAYERS = ["*"]
    # Every how many iterations they are recorded.
    cfg.STATISTICS.PERIOD = 20


def load_config(path: str) -> CfgNode:
    """
    A config of Detectron2 or of this package, on the CPU.

    Raises:
        OSError, ValueError: the file cannot be read or is not such a config.
    """
    cfg = get_cfg()
    add_mabn_config(cfg)
    try:
        cfg.merge_from_file(path)
    except (KeyError, AttributeError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a config of Detectron2: {error}") from error
    cfg.MODEL.DEVICE = "cpu"
    return cfg
