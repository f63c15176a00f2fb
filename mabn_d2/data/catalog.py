"""Registration of the synthetic shapes with Detectron2."""

import itertools
import os

from .synthetic import SHAPES_FOLDERS
from .synthetic.scenes import SHAPES


def shapes_files(root: str) -> dict[str, str]:
    """The annotations of each of the synthetic data sets, by its name."""
    return {
        f"{folder}_{split}": os.path.join(root, folder, "annotations", f"instances_{split}.json")
        for folder, split in itertools.product(SHAPES_FOLDERS.values(), ("train", "val"))
    }


def register_shapes(root: str | None = None) -> None:
    """Registers `shapes_train` and `shapes_val` with Detectron2's catalogs.

    And `shapes_content_train` to `shapes_alike_val`, which are of the other varieties.

    Nothing is read before a data set is used. Registering the same root again does nothing;
    another root replaces the first.

    Args:
        root: the folder given to `make_synthetic_coco(root, "shapes")`; by default that of
            Detectron2's own data sets, $DETECTRON2_DATASETS or "datasets".
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    default: str = os.getenv("DETECTRON2_DATASETS", "datasets")
    root = os.path.expanduser(root or default)
    for name, json_file in shapes_files(root).items():
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        metadata = {
            "thing_classes": list(SHAPES),
            "thing_dataset_id_to_contiguous_id": {k + 1: k for k in range(len(SHAPES))},
        }
        folder, _, split = name.rpartition("_")
        register_coco_instances(name, metadata, json_file, os.path.join(root, folder, split))
