"""What is checked of a LazyConfig."""

import argparse
from collections.abc import Iterator
from typing import Any

from detectron2.config import instantiate
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...checkpoint import WEIGHTS_IMPORT
from ...layers.options import Accepted
from ...plugin.registry import check_norm_name
from ...plugin.scaling import check_lazy_batch, lazy_scaling_notice, scale_lazy_config
from ..resumable import check_trainer_state
from .build import build, check_layers, quiet
from .datasets import Needs, check_coco_ground_truth, check_dataset, check_training_data
from .files import check_arguments, check_output_dir, check_start
from .values import (
    BOOLEAN,
    DEVICE,
    INTEGER,
    NON_EMPTY_STRING,
    NON_NEGATIVE_INTEGER,
    NON_NEGATIVE_NUMBER,
    POSITIVE_INTEGER,
    SEED,
    STRING,
    either,
    list_of,
    one_of,
)

# Of every config, for the trainer reads them.
_ACCEPTED: dict[str, Accepted] = {
    "train.output_dir": NON_EMPTY_STRING,
    "train.init_checkpoint": STRING,
    "train.weights_import": one_of(*WEIGHTS_IMPORT),
    "train.max_iter": POSITIVE_INTEGER,
    "train.amp.enabled": BOOLEAN,
    "train.checkpointer.period": POSITIVE_INTEGER,
    "train.checkpointer.max_to_keep": either(POSITIVE_INTEGER, one_of(None)),
    "train.eval_period": NON_NEGATIVE_INTEGER,
    "train.log_period": POSITIVE_INTEGER,
    "train.device": DEVICE,
    "train.seed": SEED,
    "train.double_forward": BOOLEAN,
    "train.ddp": Accepted("arguments of DistributedDataParallel", lambda v: isinstance(v, dict)),
}
# Of the configs that have them.
_ACCEPTED_IF_THERE: dict[str, Accepted] = {
    "train.reference_world_size": NON_NEGATIVE_INTEGER,
    "optimizer.lr": NON_NEGATIVE_NUMBER,
    "dataloader.train.total_batch_size": INTEGER,
    "dataloader.train.num_workers": NON_NEGATIVE_INTEGER,
    "train.statistics.enabled": BOOLEAN,
    "train.statistics.layers": list_of(NON_EMPTY_STRING, at_least=1),
    "train.statistics.period": POSITIVE_INTEGER,
    "dataloader.train.mapper.instance_mask_format": one_of("polygon", "bitmask"),
    "dataloader.test.num_workers": NON_NEGATIVE_INTEGER,
}


def check_lazy(cfg: DictConfig, args: argparse.Namespace) -> list[str]:
    """The counterpart of :func:`mabn_d2.engine.preflight.check` for LazyConfigs."""
    check_arguments(args)
    num_workers = args.num_gpus * args.num_machines
    warnings = check_lazy_config(cfg, num_workers, args.eval_only, args.resume)
    notice = None if args.eval_only else lazy_scaling_notice(cfg, args.opts, num_workers)
    return [*warnings, notice] if notice else warnings


def check_lazy_config(
    cfg: DictConfig, num_workers: int, eval_only: bool, resume: bool
) -> list[str]:
    """
    Finds before any worker starts, and before anything is written, what would end the run later.

    Returns:
        warnings, one line each.

    Raises:
        ValueError: a value is wrong, a norm is unknown, a data set is not registered or does not fit the
            model, weights do not exist, the batch cannot be divided among the workers, or the model, the
            optimizer or the schedule cannot be built.
        FileNotFoundError: a data set is not where it should be.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as e:
        raise ValueError(str(e).splitlines()[0]) from e
    entries = dict(items(container))
    for key, accepted in {**_ACCEPTED, **_ACCEPTED_IF_THERE}.items():
        if key in _ACCEPTED and key not in entries:
            raise ValueError(f"The config has no {key}: it must be {accepted.words}")
        if key in entries and not accepted.test(entries[key]):
            raise ValueError(f"{key} must be {accepted.words}, got {entries[key]!r}")
    if entries["train.amp.enabled"] and entries["train.device"] == "cpu" and not eval_only:
        raise ValueError("train.amp.enabled needs a GPU, train.device is 'cpu'")
    for key, value in entries.items():
        if key.endswith("norm"):
            check_norm_name(value, key)
    if not eval_only:
        check_lazy_batch(cfg, num_workers)
    check_output_dir(entries["train.output_dir"], "train.output_dir")
    weights, folder = entries["train.init_checkpoint"], entries["train.output_dir"]
    state = check_start(weights, "train.init_checkpoint", folder, resume)
    if not eval_only:
        cfg = scale_lazy_config(cfg, num_workers)
        check_trainer_state(state, folder, cfg.train.max_iter, num_workers)
    warnings = []
    _build_all(cfg, eval_only)
    for key, value in entries.items():
        if isinstance(value, dict) and "_target_" in value:
            if not (eval_only and key.startswith("dataloader.train.")):
                warnings += _check_call(key, value, entries, hand_over=num_workers == 1)
    return warnings


def items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested dicts and lists in dotted form, with their values."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield f"{prefix}{key}", value
        if isinstance(value, (dict, list)):
            yield from items(value, f"{prefix}{key}.")


def _check_call(
    key: str, call: dict[str, Any], entries: dict[str, Any], hand_over: bool
) -> list[str]:
    """Looks at the data set, if the call makes or evaluates one; returns warnings."""
    target = call["_target_"]
    target = locate(target) if isinstance(target, str) else target
    warnings = []
    if target is get_detection_dataset_dicts:
        names = call["names"]
        for name in [names] if isinstance(names, str) else names:
            check_dataset(name, f"{key}.names")
            if key.startswith("dataloader.train."):
                with quiet():
                    warnings += check_training_data(
                        name, f"{key}.names", _needs(entries), hand_over
                    )
    elif target is COCOEvaluator:
        name = call["dataset_name"]
        names = [name] if isinstance(name, str) else name
        for name in names:
            check_dataset(name, f"{key}.dataset_name")
            check_coco_ground_truth(name, f"{key}.dataset_name")
    elif hasattr(target, "check_files"):
        target.check_files(call["split"], call.get("root"))
    return warnings


def _needs(entries: dict[str, Any]) -> Needs:
    """Of Detectron2's own models, as far as their config says so."""
    classes_key = next(
        (key for key in ("model.roi_heads.num_classes", "model.num_classes") if key in entries),
        "",
    )
    mapper = "dataloader.train.mapper"
    has_masks = entries.get(f"{mapper}.use_instance_mask", False)
    return Needs(
        num_classes=entries.get(classes_key),
        num_classes_key=classes_key,
        mask_format=entries.get(f"{mapper}.instance_mask_format", "polygon") if has_masks else None,
        mask_format_key=f"{mapper}.instance_mask_format",
    )


def _build_all(cfg: DictConfig, eval_only: bool) -> None:
    model = build("model", lambda device: instantiate(cfg.model).to(device))
    if eval_only:
        return
    if OmegaConf.select(cfg, "train.statistics.enabled"):
        check_layers(model, cfg.train.statistics.layers, "train.statistics.layers")
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    if mapper is not None:
        build("dataloader.train.mapper", lambda _: instantiate(mapper))
    optimizer = build(
        "optimizer",
        lambda _: instantiate(
            {**cfg.optimizer, "params": {**cfg.optimizer.params, "model": model}}
        ),
    )

    def build_schedule(_):
        return LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)

    build(f"lr_multiplier with train.max_iter {cfg.train.max_iter}", build_schedule)
