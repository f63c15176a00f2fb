"""The norms by name, and their options."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import nn

from ..layers import BRN2d, MABN2d, MBN2d, check_options, marked_options, options_of
from ..layers.options import OF_32_IMAGES, TO_FIRST_DECAY, Accepted, StandIn, is_integer

# The names that Detectron2's own `get_norm` knows.
DETECTRON2_NORMS = (
    "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"
)  # fmt: skip
# The keys of `cfg.MODEL` that are not the options of a norm.
_MODEL_KEYS = frozenset([*get_cfg().MODEL, "NORM_BATCH_SIZE"])


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
            ValueError: a norm or a key of `cfg.MODEL` has the name.
        """
        if norm is None:
            return functools.partial(self.register, name=name)
        name = name or norm.__name__
        if name in self or name in DETECTRON2_NORMS:
            raise ValueError(f"A norm of the name {name!r} exists")
        if name in _MODEL_KEYS:
            raise ValueError(f"A norm cannot have the name {name!r}, as MODEL.{name} exists")
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


def registered(norm: Any) -> Callable[..., nn.Module] | None:
    """
    The registered class or function behind the value of a `NORM` key.

    Args:
        norm: a name; or, in a LazyConfig, the class or function or a `functools.partial` of it.

    Returns:
        None if it is not in the registry.
    """
    if isinstance(norm, str):
        return NORM_REGISTRY.get(norm) if norm in NORM_REGISTRY else None
    function = norm.func if isinstance(norm, functools.partial) else norm
    return function if any(function is known for _, known in NORM_REGISTRY) else None


def norm_factory(norm: Any) -> Callable[..., nn.Module] | None:
    """
    Args:
        norm: as of :func:`registered`.

    Returns:
        a function (num_features, **arguments) that makes the norm, one given by its name with the
        options of the model under construction; None if the norm is not in the registry.
    """
    create = registered(norm)
    if create is None:
        return None
    if isinstance(norm, str):
        create = functools.partial(create, **(options_of_model.get() or {}).get(norm, {}))
    else:
        create = norm

    def create_norm(num_features: int, **arguments) -> nn.Module:
        created = create(num_features=num_features, **arguments)
        created.is_registered_norm = True
        return created

    return create_norm


def is_registered_norm(module: nn.Module) -> bool:
    """Whether the module is of a registered class, or was made by a registered function."""
    classes = tuple(norm for _, norm in NORM_REGISTRY if inspect.isclass(norm))
    return isinstance(module, classes) or getattr(module, "is_registered_norm", False)


def norm_options(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """
    By the name of the norm, its options in the config as keyword arguments.

    A config without the options of `add_mabn_config` has none.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """
    size = cfg.MODEL.get("NORM_BATCH_SIZE", 0)
    if not is_integer(size) or size < 0:
        raise ValueError(f"MODEL.NORM_BATCH_SIZE must be a non-negative integer, got {size!r}")
    options = {}
    for name, norm in NORM_REGISTRY:
        node = cfg.MODEL.get(name, {})
        options[name] = {key: node[key.upper()] for key in options_of(norm) if key.upper() in node}
        accepted = marked_options(norm, Accepted)
        for option, stand_in in marked_options(norm, StandIn).items():
            value = options[name].get(option)
            key = f"MODEL.{name}.{option.upper()}"
            if is_integer(value) and value == stand_in.value:
                options[name][option] = _MEANINGS[stand_in](cfg, key)
            elif option in options[name] and not accepted[option].test(value):
                raise ValueError(
                    f"{key} must be {accepted[option].words}, or {stand_in.value} for {stand_in.meaning}, got {value!r}"
                )
        prefix = f"MODEL.{name}."
        check_options(norm, options[name], lambda option: prefix + option.upper())
    return options


def option_of_key(key: str) -> tuple[Callable, str] | None:
    """The registered norm and its option behind a key like "MODEL.MABN.EPS"; None for other keys."""
    node, _, option = key.rpartition(".")
    for name, norm in NORM_REGISTRY:
        if node == f"MODEL.{name}" and option.lower() in options_of(norm):
            return norm, option.lower()
    return None


def count_workers(cfg: CfgNode, processes: int) -> int:
    """
    How many workers as many processes are.

    Raises:
        ValueError: of `SOLVER.VIRTUAL_WORKERS`.
    """
    virtual = cfg.SOLVER.get("VIRTUAL_WORKERS", 1)
    if virtual < 1:
        raise ValueError(f"SOLVER.VIRTUAL_WORKERS must be a positive integer, got {virtual}")
    return processes * virtual


def _images_per_norm(cfg: CfgNode) -> int:
    """How many images a norm in a worker sees at a time."""
    solver = cfg.SOLVER
    workers = solver.REFERENCE_WORLD_SIZE or count_workers(cfg, comm.get_world_size())
    images = max(1, solver.IMS_PER_BATCH // workers)
    return min(images, cfg.MODEL.get("NORM_BATCH_SIZE", 0) or images)


def _batches_of_32_images(cfg: CfgNode, _: str) -> int:
    return max(1, round(32 / _images_per_norm(cfg)))


def _first_decay(cfg: CfgNode, key: str) -> int:
    """The iteration in which the learning rate decays first."""
    solver = cfg.SOLVER
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR" or not steps:
        raise ValueError(
            f"{key} -1 stands for the first of SOLVER.STEPS, but the learning rate has no step before the end: "
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME}, SOLVER.STEPS {tuple(solver.STEPS)}, "
            f"SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
    return steps[0]


_MEANINGS = {OF_32_IMAGES: _batches_of_32_images, TO_FIRST_DECAY: _first_decay}


def check_norm_name(norm: Any, key: str) -> None:
    """
    Args:
        norm: the value of a `NORM` key. What is neither a name nor a `functools.partial` passes.
        key: of the config, for the message.

    Raises:
        ValueError: neither the registry nor Detectron2 knows the name, or an argument of the
            `functools.partial` is out of its range.
    """
    if isinstance(norm, functools.partial) and registered(norm) is not None:
        check_options(norm.func, norm.keywords, lambda option: f"{key}: {option}")
    is_known = not isinstance(norm, str) or norm == "" or norm in DETECTRON2_NORMS
    if not is_known and norm not in NORM_REGISTRY:
        known = [*(name for name, _ in NORM_REGISTRY), *DETECTRON2_NORMS]
        raise ValueError(f"{key} must be one of {', '.join(known)}, or '', got {norm!r}")


def check_norm_names(cfg: CfgNode, prefix: str = "") -> None:
    """:func:`check_norm_name` for every `NORM` key of a config."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            check_norm_names(value, f"{prefix}{key}.")
        elif key == "NORM":
            check_norm_name(value, prefix + key)
