"""The norms by name, and their options."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from ..layers import BRN2d, MABN2d, MBN2d, check_options, options_of

# The names that Detectron2's own `get_norm` knows.
DETECTRON2_NORMS = (
    "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"
)  # fmt: skip


class NormRegistry(Registry):
    """
    Norms by the name that a `NORM` key of a config gives them.

    A norm is a class, or a function that makes a module. It is called with the number of channels as
    `num_features`, with its options, and with `affine=False` in a head that is shared over feature levels.
    Its options are the keyword arguments with a default; `add_mabn_config` makes of them
    `cfg.MODEL.<NAME>.<OPTION>`. See :mod:`mabn_d2.layers.options` for their ranges.
    """

    def register(self, norm: Callable[..., nn.Module] | None = None, *, name: str | None = None):
        """
        Args:
            norm: without it, this is a decorator.
            name: by default that of the class or function.

        Raises:
            ValueError: the name is taken.
        """
        if norm is None:
            return lambda norm: self.register(norm, name=name)
        name = name or norm.__name__
        if name in self or name in DETECTRON2_NORMS:
            raise ValueError(f"A norm of the name {name!r} exists")
        self._do_register(name, norm)
        return norm


NORM_REGISTRY = NormRegistry("NORM")
NORM_REGISTRY.register(MABN2d, name="MABN")
NORM_REGISTRY.register(BRN2d, name="BRN")
NORM_REGISTRY.register(MBN2d, name="MBN")

# Options of the norms of the model under construction; None while none is.
options_of_model: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar(
    "options_of_model", default=None
)

# What registered norms are: told by the norms that were made.
norm_types: set[type] = {MABN2d, BRN2d, MBN2d}


def create_norm(name: str, num_features: int, **overrides) -> nn.Module:
    """
    A registered norm with the options of the model under construction.

    Args:
        name: in the registry.
        num_features: channels.
        overrides: keyword arguments of the norm.
    """
    options = (options_of_model.get() or {}).get(name, {})
    norm = NORM_REGISTRY.get(name)(num_features=num_features, **{**options, **overrides})
    norm_types.add(type(norm))
    return norm


def norm_options(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """
    By the name of the norm, its options in the config as keyword arguments.

    A config without the options of `add_mabn_config` has none.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """
    options = {}
    for name, norm in NORM_REGISTRY:
        node = cfg.MODEL.get(name, {})
        options[name] = {key: node[key.upper()] for key in options_of(norm) if key.upper() in node}
        prefix = f"MODEL.{name}."
        check_options(norm, options[name], lambda option: prefix + option.upper())
    size = cfg.MODEL.get("NORM_BATCH_SIZE", 0)
    if size < 0:
        raise ValueError(f"MODEL.NORM_BATCH_SIZE must be a non-negative integer, got {size}")
    return options


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
