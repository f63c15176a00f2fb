"""MABN in Detectron2: its options, the registry of norms, and what is plugged in where."""

from ..utils import needs_detectron2  # noqa: F401
from .config import add_mabn_config, load_config
from .install import install, uninstall
from .registry import (
    DETECTRON2_NORMS,
    NORM_REGISTRY,
    check_norm_name,
    check_norm_names,
    norm_options,
)
from .resnet26 import build_resnet26_fpn_backbone
from .scaling import check_batch, scaling_notice

__all__ = [
    "DETECTRON2_NORMS",
    "NORM_REGISTRY",
    "add_mabn_config",
    "build_resnet26_fpn_backbone",
    "check_batch",
    "check_norm_name",
    "check_norm_names",
    "install",
    "load_config",
    "norm_options",
    "scaling_notice",
    "uninstall",
]
