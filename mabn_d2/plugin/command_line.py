"""What the tools that read configs have in common: options that bring in a user's code and data."""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import register_shapes

_NUM_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options that :func:`bring_in` takes, and returns the parser."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE_OR_MODULE",
        help="Python code to import before the config is read, which registers norms, data sets "
        "or heads; can be repeated",
    )
    parser.add_argument(
        "--coco-data",
        action="append",
        default=[],
        metavar="NAME=ANNOTATIONS.json:IMAGES",
        help="a data set in COCO's format, by the name that DATASETS.TRAIN and DATASETS.TEST give "
        "it, with its folder of images; can be repeated. NUM_CLASSES becomes the number of "
        "categories of the training data, unless the config file or the command line states it",
    )
    return parser


def bring_in(args: argparse.Namespace) -> None:
    """
    Imports and registers what a command line names, and the data set `shapes`.

    For every worker, before the config is read. Doing it again does nothing.

    Args:
        args: with the options of :func:`add_arguments`.

    Raises:
        ValueError: something does not exist or cannot be imported or registered.
    """
    register_shapes()
    for name in args.imports:
        _import(name)
    for text in args.coco_data:
        _register_coco_data(text)


def _import(name: str) -> None:
    is_file = name.endswith(".py")
    path = os.path.realpath(name)
    if is_file and not os.path.isfile(path):
        raise ValueError(f"--import: {name} does not exist")
    if is_file:
        # By its name, so that processes that are not forked find it, too.
        folder, module_name = os.path.dirname(path), os.path.basename(path)[: -len(".py")]
        if folder not in sys.path:
            sys.path.append(folder)
    else:
        module_name = name
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = "" if isinstance(error, ImportError) else f" ({where.filename}, line {where.lineno})"
        raise ValueError(f"--import {name}: {type(error).__name__}: {error}{at}") from error
    if is_file and os.path.realpath(module.__file__ or "") != path:
        raise ValueError(
            f"--import: {name} has the name of another module, {module.__file__ or module_name}; "
            "rename it"
        )


def _register_coco_data(text: str) -> None:
    name, equals, files = text.partition("=")
    annotations, colon, images = files.rpartition(":")
    if not (name and equals and annotations and colon and images):
        raise ValueError(f"--coco-data must be NAME=ANNOTATIONS.json:IMAGES, got {text!r}")
    if not os.path.isfile(annotations):
        raise ValueError(f"--coco-data {name}: {annotations} is not a file")
    if not os.path.isdir(images):
        raise ValueError(f"--coco-data {name}: {images} is not a folder")
    if name in DatasetCatalog.list():
        registered = MetadataCatalog.get(name)
        if (registered.get("json_file"), registered.get("image_root")) != (annotations, images):
            raise ValueError(f"--coco-data {name}: a data set of this name exists")
        return
    register_coco_instances(name, {}, annotations, images)


def set_num_classes(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Makes `NUM_CLASSES` the number of categories of the `--coco-data` that is trained on.

    What `args.opts`, or the config file itself, states stays; what the file inherits does not. The
    result becomes part of `args.opts`, so that the workers do not read the annotations for it again.

    Raises:
        ValueError: the annotations cannot be read, or two training sets differ.
    """
    number = _count_categories(args, cfg.DATASETS.TRAIN)
    if number is None:
        return
    with open(args.config_file) as f:
        file = yaml.unsafe_load(f)  # as Detectron2, which has read it by now
    stated = {key for key in _NUM_CLASSES if _is_stated(file, key.split("."))}
    added = [
        item
        for key in _NUM_CLASSES
        if key not in stated and key not in args.opts[::2]
        for item in (key, str(number))
    ]
    cfg.merge_from_list(added)
    args.opts += added


def _is_stated(node, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True


def set_lazy_num_classes(cfg: DictConfig, args: argparse.Namespace) -> None:
    """
    :func:`set_num_classes` for every `num_classes` of the model of a LazyConfig.

    Those of `args.opts` stay, as do those of semantic segmentation, which counts other classes.
    """
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
    number = _count_categories(args, [names] if isinstance(names, str) else names)
    if number is None:
        return
    given = {override.partition("=")[0] for override in args.opts}
    added = [f"{key}={number}" for key in _num_classes_keys(cfg.model) if key not in given]
    for override in added:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, int(value))
    args.opts += added


def _num_classes_keys(node: DictConfig | ListConfig, prefix: str = "model"):
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_interpolation(node, key) or key == "sem_seg_head":
            continue
        if key == "num_classes":
            yield f"{prefix}.{key}"
        elif isinstance(node[key], (DictConfig, ListConfig)):
            yield from _num_classes_keys(node[key], f"{prefix}.{key}")


def _count_categories(args: argparse.Namespace, names: Sequence[str]) -> int | None:
    """How many categories the `--coco-data` among these data sets has; None without any."""
    numbers = {}
    for text in args.coco_data:
        name = text.partition("=")[0]
        if name in names:
            file = MetadataCatalog.get(name).json_file
            try:
                with open(file) as f:
                    numbers[name] = len(json.load(f)["categories"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--coco-data {name}: {file} is not in COCO's format: {error}"
                ) from error
    if len(set(numbers.values())) > 1:
        raise ValueError(f"--coco-data: the training sets differ in their categories: {numbers}")
    return next(iter(numbers.values()), None)
