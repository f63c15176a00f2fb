"""
One recipe for any number of workers.

A config says for how many workers it is written, `SOLVER.REFERENCE_WORLD_SIZE` or
`train.reference_world_size`. With another number, the images per worker stay what they are, the
learning rate is multiplied by the ratio (https://arxiv.org/abs/1706.02677) and whatever counts
iterations is divided by it: the schedule, its periods, and the options of norms that say so.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..layers import marked_options, options_of
from ..layers.options import TO_FIRST_DECAY, CountsIterations
from .registry import NORM_REGISTRY, registered

logger = logging.getLogger(__name__)
_REFERENCE = "SOLVER.REFERENCE_WORLD_SIZE"
_LAZY_REFERENCE = "train.reference_world_size"
_LAZY_BATCH = "dataloader.train.total_batch_size"


def scale_config(cfg: CfgNode, num_workers: int, scale_schedule: Callable) -> CfgNode:
    """
    Args:
        cfg: stays as it is.
        scale_schedule: Detectron2's `auto_scale_workers`, which does it for `SOLVER` and `TEST`.

    Returns:
        the config for `num_workers`; the same if that is what it is written for.

    Raises:
        ValueError: the batch cannot be divided among the workers.
    """
    check_batch(cfg, num_workers)
    ratio = _ratio(cfg.SOLVER.REFERENCE_WORLD_SIZE, num_workers)
    if ratio == 1:
        return cfg
    scaled = scale_schedule(cfg, num_workers)
    was_frozen = scaled.is_frozen()
    scaled.defrost()
    if cfg.SOLVER.CHECKPOINT_PERIOD > 0:
        scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
    if cfg.TEST.EVAL_PERIOD > 0:  # 0 stands for no evaluation before the end
        scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
    changes = []
    for name, norm in NORM_REGISTRY:
        node = scaled.MODEL.get(name, {})
        for option in marked_options(norm, CountsIterations):
            key = option.upper()
            if key in node:
                before, node[key] = node[key], _scale(node[key], ratio)
                if name in norm_names(cfg):
                    changes.append(f"MODEL.{name}.{key} {before} -> {node[key]}")
    if changes:
        logger.info(f"Scaled to {_workers(num_workers)}: {', '.join(changes)}")
    if was_frozen:
        scaled.freeze()
    return scaled


def check_batch(cfg: CfgNode, num_workers: int) -> None:
    """
    Raises:
        ValueError: `SOLVER.IMS_PER_BATCH` cannot be divided among the workers, or among those that
            the config is written for.
    """
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    _check_batch("SOLVER.IMS_PER_BATCH", batch, _REFERENCE, reference, num_workers)


def check_lazy_batch(cfg: DictConfig, num_workers: int) -> None:
    """:func:`check_batch` for a LazyConfig, whose loader may have another way to state its batch."""
    batch = OmegaConf.select(cfg, _LAZY_BATCH)
    if batch is not None:
        reference = cfg.train.get("reference_world_size", 0)
        _check_batch(_LAZY_BATCH, batch, _LAZY_REFERENCE, reference, num_workers)


def _check_batch(key: str, batch: int, reference_key: str, reference: int, num_workers: int):
    if reference < 0:
        raise ValueError(f"{reference_key} must be a non-negative integer, got {reference}")
    if reference and (batch < 1 or batch % reference):
        raise ValueError(
            f"{key} must be a positive multiple of {reference_key} ({reference}), got {batch}; "
            f"where {reference_key} is 0, the batch is taken literally"
        )
    if not reference and (batch < 1 or batch % num_workers):
        raise ValueError(
            f"{key} must be a positive multiple of the number of workers ({num_workers}), got {batch}"
        )


def scaling_notice(cfg: CfgNode, overrides: Sequence, num_workers: int) -> str | None:
    """
    What becomes of the batch, the learning rate and the length of a run that a command line gives.

    Args:
        cfg: with the overrides merged.
        overrides: keys and values in turn.

    Returns:
        one line; None if the config is taken literally or the overrides name none of them.
    """
    solver = cfg.SOLVER
    values = {
        "SOLVER.IMS_PER_BATCH": solver.IMS_PER_BATCH,
        "SOLVER.BASE_LR": solver.BASE_LR,
        "SOLVER.MAX_ITER": solver.MAX_ITER,
    }
    given = {key: value for key, value in values.items() if key in overrides[::2]}
    return _notice(given, _REFERENCE, solver.REFERENCE_WORLD_SIZE, num_workers)


def lazy_scaling_notice(cfg: DictConfig, overrides: Sequence[str], num_workers: int) -> str | None:
    """:func:`scaling_notice` for a LazyConfig with its overrides, strings `key=value`."""
    given = {}
    for override in overrides:
        key = override.partition("=")[0]
        if key in (_LAZY_BATCH, "optimizer.lr", "train.max_iter"):
            given[key] = OmegaConf.select(cfg, key)
    return _notice(given, _LAZY_REFERENCE, cfg.train.get("reference_world_size", 0), num_workers)


def _notice(given: dict, reference_key: str, reference: int, num_workers: int) -> str | None:
    ratio = _ratio(reference, num_workers)
    if ratio == 1 or not given:
        return None
    changes = []
    for key, value in given.items():
        if key.lower().endswith("max_iter"):
            scaled = _scale(value, ratio)
        else:
            scaled = value * ratio
        changes.append(f"{key} {value} becomes {scaled:.10g}")
    return (
        f"{reference_key} is {reference}, the run has {_workers(num_workers)}: {', '.join(changes)}. "
        f"{reference_key} 0 takes them literally."
    )


def scale_lazy_config(cfg: DictConfig, num_workers: int) -> DictConfig:
    """
    :func:`scale_config` for a LazyConfig.

    Lengths that are a part of `train.max_iter`, as those of fvcore's schedulers, follow it.
    """
    check_lazy_batch(cfg, num_workers)
    batch = OmegaConf.select(cfg, _LAZY_BATCH)
    ratio = _ratio(cfg.train.get("reference_world_size", 0), num_workers)
    if ratio == 1:
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.train.reference_world_size = num_workers
    changes = []

    def change(node: DictConfig, key: str, value: Any, name: str) -> None:
        changes.append(f"{name} {node[key]} -> {value}")
        node[key] = value

    if batch is not None:
        change(cfg.dataloader.train, "total_batch_size", round(batch * ratio), _LAZY_BATCH)
    change(cfg.optimizer, "lr", cfg.optimizer.lr * ratio, "optimizer.lr")
    change(cfg.train, "max_iter", _scale(cfg.train.max_iter, ratio), "train.max_iter")
    for node, key in [(cfg.train, "eval_period"), (cfg.train.checkpointer, "period")]:
        if node[key] > 0:
            node[key] = max(1, _scale(node[key], ratio))
    for node, key, path in _norm_values(cfg.model, "model"):
        norm = node[key]
        own = norm.keywords if isinstance(norm, functools.partial) else {}
        known = {**options_of(registered(norm)), **own}
        counts = marked_options(registered(norm), CountsIterations)
        options = {option: _scale(known[option], ratio) for option in counts}
        changes += [f"{path}: {option} {known[option]} -> {options[option]}" for option in options]
        node[key] = functools.partial(registered(norm), **{**own, **options})
    logger.info(f"Scaled to {_workers(num_workers)}: {', '.join(changes)}")
    return cfg


def _norm_values(node: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Where in a LazyConfig registered norms stand, but for references to other places."""
    if isinstance(node, (DictConfig, ListConfig)):
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            if not OmegaConf.is_interpolation(node, key):
                if str(key).endswith("norm") and registered(node[key]) is not None:
                    yield node, key, f"{path}.{key}"
                yield from _norm_values(node[key], f"{path}.{key}")


def norm_names(node: CfgNode) -> set[str]:
    """The values of all `NORM` keys of a config."""
    names = {value for key, value in node.items() if key == "NORM" and isinstance(value, str)}
    return names.union(
        *(norm_names(value) for value in node.values() if isinstance(value, CfgNode))
    )


def _ratio(reference: int, num_workers: int) -> float:
    return num_workers / reference if reference else 1


def _scale(iterations: int | Sequence[int], ratio: float) -> int | tuple[int, ...]:
    if iterations == TO_FIRST_DECAY.value:  # which is scaled itself
        return iterations
    if isinstance(iterations, int):
        return round(iterations / ratio)
    return tuple(round(iteration / ratio) for iteration in iterations)


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number != 1)}"
