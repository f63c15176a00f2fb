"""What is checked of a config before any worker starts."""

import os
from collections.abc import Iterator
from typing import (
    Any,
)

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..plugin.registry import check_norm_name
from ..plugin.scaling import check_lazy_batch


def check_dataset(name: str, key: str) -> None:
    """
    Args:
        name: of a data set for detection.
        key: of the config, for the message.

    Raises:
        ValueError: the data set is not registered, or its annotations do not exist.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(f"{key}: no data set is registered as {name!r}")
    file = getattr(MetadataCatalog.get(name), "json_file", None)
    if file and not PathManager.exists(file):
        raise ValueError(
            f"{key}: {name} needs {file}, which does not exist. The environment variable "
            "DETECTRON2_DATASETS names the folder of the data sets, by default ./datasets"
        )


def check_weights(weights: str, key: str) -> None:
    """
    Args:
        weights: path or URL; "" for none.
        key: of the config, for the message.

    Raises:
        ValueError: it is a path of no file.
    """
    weights = weights.split("?")[0]  # Detectron2 takes options behind the name
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ValueError(f"{key}: {weights} does not exist")


def check_lazy_config(cfg: DictConfig, num_workers: int, eval_only: bool, resume: bool) -> None:
    """
    Finds the mistakes that can be found without building anything.

    Raises:
        ValueError: a norm is unknown, a data set is not registered, weights do not exist, the batch
            cannot be divided among the workers, or an interpolation is wrong.
        FileNotFoundError: a data set is not where it should be.
    """
    try:
        entries = list(items(OmegaConf.to_container(cfg, resolve=True)))
    except OmegaConfBaseException as e:
        raise ValueError(str(e).splitlines()[0]) from e
    for key, value in entries:
        if key.endswith("norm"):
            check_norm_name(value, key)
        if isinstance(value, dict) and "_target_" in value:
            if not (eval_only and key.startswith("dataloader.train.")):
                _check_call(key, value)
    if not eval_only:
        check_lazy_batch(cfg, num_workers)
    if not resume:
        check_weights(cfg.train.init_checkpoint, "train.init_checkpoint")


def items(node: dict | list, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested containers in dotted form, with their values."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield f"{prefix}{key}", value
        if isinstance(value, (dict, list)):
            yield from items(value, f"{prefix}{key}.")


def _check_call(key: str, call: dict[str, Any]) -> None:
    """Finds a missing data set, if the call makes one."""
    target = call["_target_"]
    target = locate(target) if isinstance(target, str) else target
    if target is get_detection_dataset_dicts:
        names = call["names"]
        for name in [names] if isinstance(names, str) else names:
            check_dataset(name, f"{key}.names")
    elif hasattr(target, "check_files"):
        target.check_files(call["split"], call.get("root"))
