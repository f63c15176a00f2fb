"""
Memory of a process that has built a training loader, in MiB over what it had before.

    python -m tests.helpers.loader_memory mabn_d2 20000
    python -m tests.helpers.loader_memory detectron2 20000

prints what it holds and its peak meanwhile, for so many images with seven polygons of 20 corners each.
"""

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances

from mabn_d2.data.loader import build_train_loader


def write_annotations(file: Path, num_images: int) -> None:
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(num_images):
        images.append({"id": image, "file_name": f"{image:012d}.jpg", "width": 640, "height": 480})
        for corners in random.integers(0, 480, (7, 40)):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0,
                 "area": 1000.0, "bbox": [1.5, 2.5, 30.0, 40.0],
                 "segmentation": [(corners / 4).tolist()]}
            )  # fmt: skip
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))


def status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def settle() -> None:
    """Gives what was freed back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(build, file: Path) -> tuple[float, float]:
    """What the loader holds and the peak until the first batch is drawn, in MiB."""
    register_coco_instances("memory", {}, str(file), str(file.parent))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("memory",)
    cfg.DATALOADER.NUM_WORKERS = 0
    mapper = lambda entry: {"width": entry["width"], "height": entry["height"]}  # noqa: E731
    settle()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loader = build(cfg, mapper=mapper)
    iterator = iter(loader)
    next(iterator)
    peak = status("VmHWM")
    settle()
    held = status("VmRSS")
    DatasetCatalog.remove("memory")
    return held - before, peak - before


if __name__ == "__main__":
    builds = {"mabn_d2": build_train_loader, "detectron2": build_detection_train_loader}
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "annotations.json"
        write_annotations(annotations, int(sys.argv[2]))
        held, peak = measure(builds[sys.argv[1]], annotations)
    print(f"held {held:.0f} peak {peak:.0f}")
