"""What is checked of the data sets of Detectron2's catalog."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...layers.options import is_integer
from ...utils.command_line import one_line


class Needs(NamedTuple):
    """What a model takes from the annotations, each with the key that says so; None for nothing."""

    num_classes: int | None = None
    num_classes_key: str = ""
    mask_format: str | None = None  # "polygon" or "bitmask"
    mask_format_key: str = ""
    num_keypoints: int | None = None
    num_keypoints_key: str = ""
    semantic: bool = False  # an image of classes for each image


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
    if file and not PathManager.isfile(file):
        raise ValueError(
            f"{key}: {name} needs {file}, which does not exist. The environment variable "
            "DETECTRON2_DATASETS names the folder of the data sets, by default ./datasets"
        )


def check_training_data(name: str, key: str, needs: Needs, hand_over: bool = False) -> list[str]:
    """
    Reads a data set once and looks at every annotation once.

    Args:
        name: of a registered data set.
        key: of the config, for the message.
        needs: of the model.
        hand_over: whether the training, in this process, gets what was read here instead of reading
            the data set again; otherwise nothing is kept.

    Returns:
        warnings, one line each.

    Raises:
        ValueError: the data set has no length, is empty, or has an annotation that the training would
            end at. The message names the file, the annotation and the option to set.
    """
    what = f"{key}: {name}"
    file = getattr(MetadataCatalog.get(name), "json_file", None)
    try:
        dicts = DatasetCatalog.get(name)
    except Exception as error:  # of a user's function, of any type
        source = f" from {file}" if file else ""
        raise ValueError(f"{what} cannot be read{source}: {one_line(error)}") from error
    if not (hasattr(dicts, "__len__") and hasattr(dicts, "__getitem__")):
        raise ValueError(
            f"{what} is a {type(dicts).__name__}: a data set must have a length and be indexed, as a "
            "list, for a run to be resumed at any iteration. A stream must be stored first"
        )
    if len(dicts) == 0:
        raise ValueError(f"{what} has no images")
    if not isinstance(dicts, (list, tuple)):
        return []  # a torch Dataset, which may read a file for each of its elements
    _check_file(dicts[0], what)
    highest = -1
    for image in dicts:
        if not isinstance(image, dict) or "file_name" not in image and "image" not in image:
            raise ValueError(
                f"{what}: expected a dict with file_name for each image, got {image!r}"
            )
        if needs.semantic and not ("sem_seg_file_name" in image or "sem_seg" in image):
            raise ValueError(f"{what}: {image['file_name']} has no sem_seg_file_name")
        for index, annotation in enumerate(image.get("annotations", ())):
            if annotation.get("iscrowd", 0) == 0:  # Detectron2 leaves out the others
                problem = _problem(annotation, needs)
                if problem:
                    file_name = image.get("file_name", "an image")
                    raise ValueError(f"{what}: {file_name}: annotation {index} {problem}")
                highest = max(highest, annotation["category_id"])
    if hand_over:
        _hand_over(name, dicts)
    return _unused_classes(name, needs, highest)


def _hand_over(name: str, dicts: Sequence) -> None:
    """The catalog gives the next reader these, and the one after it what it gave before."""
    read = DatasetCatalog.pop(name)

    def give_once():
        DatasetCatalog[name] = read
        return dicts

    DatasetCatalog[name] = give_once


def _check_file(image: Any, what: str) -> None:
    """Looks at one image only: a wrong folder concerns all of them."""
    file = image.get("file_name") if isinstance(image, dict) else None
    if isinstance(file, (str, os.PathLike)) and not PathManager.isfile(file):
        raise ValueError(f"{what}: the image {file} does not exist")


def _problem(annotation: dict[str, Any], needs: Needs) -> str:
    """What keeps the model from training on an annotation; "" for nothing."""
    for part in ("bbox", "bbox_mode", "category_id"):
        if part not in annotation:
            return f"has no {part}"
    category = annotation["category_id"]
    if not is_integer(category) or category < 0:
        return f"has category_id {category!r}, expected an integer from 0"
    if needs.num_classes is not None and category >= needs.num_classes:
        return (
            f"has category_id {category}, counted from 0, but {needs.num_classes_key} is "
            f"{needs.num_classes}: set it to {category + 1} or more"
        )
    if needs.mask_format is not None:
        mask = annotation.get("segmentation")
        if mask is None or isinstance(mask, list) and not mask:
            return "has no segmentation, which a model with masks needs"
        if needs.mask_format == "polygon":
            if not isinstance(mask, list):
                return (
                    f"has a mask that is no polygon (a {type(mask).__name__}, as of RLE): set "
                    f"{needs.mask_format_key} to bitmask"
                )
            if any(len(polygon) % 2 or len(polygon) < 6 for polygon in mask):
                return "has a polygon of an odd number of coordinates, or of fewer than 6"
    if needs.num_keypoints is not None and "keypoints" in annotation:
        count = len(annotation["keypoints"]) / 3
        if count != needs.num_keypoints:
            return (
                f"has {count:g} keypoints, but {needs.num_keypoints_key} is {needs.num_keypoints}: set it "
                "to the number of the data"
            )
    return ""


def _unused_classes(name: str, needs: Needs, highest: int) -> list[str]:
    """A warning if the model has more classes than the data set."""
    classes = getattr(MetadataCatalog.get(name), "thing_classes", None)
    count = len(classes) if classes else highest + 1
    if needs.num_classes is None or count == 0 or needs.num_classes <= count:
        return []
    return [
        f"{needs.num_classes_key} is {needs.num_classes}, {name} has {count} classes: the others are "
        "trained to be nowhere"
    ]


def check_coco_ground_truth(name: str, key: str) -> None:
    """
    Raises:
        ValueError: an annotation of a COCO file lacks what COCO's evaluation reads.
    """
    file = getattr(MetadataCatalog.get(name), "json_file", None)
    if not file:
        return  # the evaluator writes one that has everything
    try:
        with PathManager.open(file) as f:
            annotations: Iterable = json.load(f).get("annotations", ())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{key}: {name}: {file} is no COCO file: {one_line(error)}") from error
    for annotation in annotations:
        missing = [part for part in ("id", "area", "iscrowd") if part not in annotation]
        if missing:
            raise ValueError(
                f"{key}: {name}: annotation {annotation.get('id', '')} in {file} has no "
                f"{' and no '.join(missing)}, which the COCO evaluation reads: add them (area in pixels, "
                f"iscrowd 0), or leave {name} out of {key}"
            )
