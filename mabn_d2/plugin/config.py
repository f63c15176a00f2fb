"""The options that the package adds to a Detectron2 config."""

from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..layers.norm import check_options


def add_mabn_config(cfg: CfgNode) -> None:
    """Adds `MODEL.MABN`, `MODEL.BRN`, `MODEL.MBN` and `MODEL.NORM_BATCH_SIZE`."""
    # Moving Average Batch Normalization, with the constants of its paper's COCO experiments.
    cfg.MODEL.MABN = CfgNode()
    # Weight of the new value in the running statistic, as in PyTorch's BN. The paper's alpha = 0.98.
    cfg.MODEL.MABN.MOMENTUM = 0.02
    # Added to the second moment before its root is taken.
    cfg.MODEL.MABN.EPS = 1e-5
    # Batches that a moving average spans. The paper averages over 32 images, which is 32 divided by
    # the images per GPU.
    cfg.MODEL.MABN.BUFFER_SIZE = 16
    # Iterations at the start that use the batch's own statistics.
    cfg.MODEL.MABN.WARMUP_ITERS = 100
    # Bound of the renormalization r, the ratio of the moving average to the running statistic:
    # 1/RENORM_CLIP <= r <= RENORM_CLIP.
    cfg.MODEL.MABN.RENORM_CLIP = 5.0
    # Iterations at the start with r = 1.
    cfg.MODEL.MABN.RENORM_START_ITER = 1000

    # Batch Renormalization, with the constants of its paper.
    cfg.MODEL.BRN = CfgNode()
    # Weight of the new value in the running statistics, as in PyTorch's BN.
    cfg.MODEL.BRN.MOMENTUM = 0.01
    # Added to the variances before their root is taken.
    cfg.MODEL.BRN.EPS = 1e-5
    # Bound of r, the ratio of the batch's standard deviation to the running one. It grows from 1
    # between the two iterations.
    cfg.MODEL.BRN.R_MAX = 3.0
    cfg.MODEL.BRN.R_MAX_ITERS = (5000, 40000)
    # Bound of d, the distance of the means in running standard deviations. It grows from 0.
    cfg.MODEL.BRN.D_MAX = 5.0
    cfg.MODEL.BRN.D_MAX_ITERS = (5000, 25000)

    # Memorized Batch Normalization.
    cfg.MODEL.MBN = CfgNode()
    # Added to the variances before their root is taken.
    cfg.MODEL.MBN.EPS = 1e-5
    # Batches that are remembered, the current one included.
    cfg.MODEL.MBN.MEMORY_SIZE = 16
    # Weight of the current batch; the older ones divide the rest.
    cfg.MODEL.MBN.CURRENT_WEIGHT = 0.5
    # Ratio of the weight of a remembered batch to that of the next newer one.
    cfg.MODEL.MBN.DECAY = 0.9
    # Whether each mini-batch is run forward once more after the optimizer's step, to renew its
    # statistics in the memory.
    cfg.MODEL.MBN.DOUBLE_FORWARD = True

    # Images of a worker that a norm takes its statistics from; with 2, a norm sees 16 images as 8
    # batches of 2 in turn. 0 stands for all. Norms in RoI heads, whose batches are regions, see all.
    cfg.MODEL.NORM_BATCH_SIZE = 0


def norm_options(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """
    By the name of the norm, its options in the config as keyword arguments of its class.

    A config without the options of :func:`add_mabn_config` has none.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """
    options = {}
    for norm in ("MABN", "BRN", "MBN"):
        if norm in cfg.MODEL:
            options[norm] = {
                key.lower(): value
                for key, value in cfg.MODEL[norm].items()
                if key != "DOUBLE_FORWARD"  # the trainer's
            }
            check_options(options[norm], lambda option: f"MODEL.{norm}.{option.upper()}")
    size = cfg.MODEL.get("NORM_BATCH_SIZE", 0)
    if size < 0:
        raise ValueError(f"MODEL.NORM_BATCH_SIZE must be a non-negative integer, got {size}")
    return options


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
