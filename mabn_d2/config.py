"""The options that the package adds to a Detectron2 config."""
from typing import Any, Dict

from detectron2.config import CfgNode

from .layers.mabn import check_options


def add_mabn_config(cfg: CfgNode) -> None:
    """Adds `MODEL.MABN` with the constants of the paper's COCO experiments."""
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


def mabn_options(cfg: CfgNode) -> Dict[str, Any]:
    """
    `cfg.MODEL.MABN` as keyword arguments of :class:`mabn_d2.layers.MABN2d`.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """
    options = {key.lower(): value for key, value in cfg.MODEL.MABN.items()}
    check_options(options, lambda option: f"MODEL.MABN.{option.upper()}")
    return options
