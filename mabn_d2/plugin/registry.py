"""The norms by name, and their options."""

from contextvars import ContextVar
from typing import Any

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from ..layers import BRN2d, MABN2d, MBN2d

NORM_REGISTRY = Registry("NORM")
NORM_REGISTRY.__doc__ = """
Norms by the name that a `NORM` key of a config gives them. A registered object is called with the
number of channels, and with keyword arguments that override its options, and returns a module.
"""
# The names that Detectron2's own `get_norm` knows.
DETECTRON2_NORMS = (
    "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"
)  # fmt: skip
# Options of the norms of the model under construction; None while none is.
_options: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("options", default=None)


def _register(name: str, norm_class: type) -> None:
    """Registers a norm that takes its options from `cfg.MODEL.<name>`, or else its class's defaults."""

    def create(num_features: int, **overrides) -> nn.Module:
        options = (_options.get() or {}).get(name, {})
        return norm_class(num_features, **{**options, **overrides})

    create.__name__ = create.__qualname__ = name
    NORM_REGISTRY.register(create)


_register("MABN", MABN2d)
_register("BRN", BRN2d)
_register("MBN", MBN2d)


def check_norm_name(norm: str, key: str) -> None:
    """
    Raises:
        ValueError: neither the registry nor Detectron2 knows the norm; the message begins with the
            key of the config, `key`.
    """
    if norm and norm not in NORM_REGISTRY and norm not in DETECTRON2_NORMS:
        known = [*(name for name, _ in NORM_REGISTRY), *DETECTRON2_NORMS]
        raise ValueError(f"{key} must be one of {', '.join(known)}, or '', got {norm!r}")


def check_norm_names(cfg: CfgNode, prefix: str = "") -> None:
    """:func:`check_norm_name` for every `NORM` key of a config."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            check_norm_names(value, f"{prefix}{key}.")
        elif key == "NORM" and isinstance(value, str):
            check_norm_name(value, prefix + key)
