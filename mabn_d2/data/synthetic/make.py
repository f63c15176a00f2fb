"""Writes synthetic data sets in COCO's format and folder layout."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .annotations import annotate, panoptic
from .looks import random_camera, random_look
from .outlines import KEYPOINTS, SKELETON
from .scenes import SHAPES, STUFF, Content, Scene, coco_scene, shapes_scene

SPLITS = ("train", "val")

SHAPES_FOLDERS = {"looks": "shapes", "content": "shapes_content", "alike": "shapes_alike"}
VARIETIES = tuple(SHAPES_FOLDERS)

_JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Layout:
    folders: dict[str, str]  # below OUT, by variety
    suffix: str  # of the names of the splits
    size: int  # default, in pixels
    draw: Callable[..., Scene]  # of a generator, the size and, where it varies, the content


LAYOUTS = {
    "shapes": _Layout(SHAPES_FOLDERS, "", 128, shapes_scene),
    # Detectron2 knows one folder.
    "coco2017": _Layout({"looks": "coco", "alike": "coco"}, "2017", 480, coco_scene),
}


@dataclass(frozen=True)
class _Task:
    """All that the images of one split have in common."""

    root: Path
    layout: str
    split: str
    size: int
    seed: int
    variety: str
    things: list[dict]
    stuff: list[dict]  # all of COCO's stuff categories; empty for a layout without stuff

    @property
    def name(self) -> str:
        return self.split + LAYOUTS[self.layout].suffix

    @property
    def like_coco(self) -> bool:
        """Whether there are keypoints and panoptic ground truth."""
        return bool(self.stuff)


def make_synthetic_coco(
    out: str | Path,
    layout: str = "shapes",
    train: int = 1000,
    val: int = 200,
    size: int | None = None,
    seed: int = 0,
    variety: str = "looks",
    workers: int = 1,
) -> Path:
    """Draws and writes a data set for instance segmentation.

    Layout "shapes" holds square scenes of 6 categories that differ in shape alone. Layout
    "coco2017" has the folders, file names and 80 categories of COCO 2017, with person keypoints
    and panoptic ground truth, for unmodified COCO configs of Detectron2. The same arguments give
    the same bytes, whatever the number of workers. The folder appears when it is complete.

    Args:
        out: folder to create the data set in, the value for $DETECTRON2_DATASETS.
        layout: "shapes" or "coco2017".
        train: number of training images.
        val: number of validation images.
        size: short side in pixels ("coco2017": on average); 128 for shapes, 480 for coco2017.
        seed: of all random choices.
        variety: how images differ from one another. "looks" gives every image one of six looks
            (dark, hazy, noisy, tinted, blurred, inverted), most of which an affine map of its
            pixels undoes. "content", of layout "shapes" alone, gives it what none undoes: few or
            many objects, small or large ones, their patterns, a texture behind them, blur and
            noise. "alike" leaves images alike.
        workers: number of processes that draw; with more than one, the calling script needs
            the `if __name__ == "__main__"` guard of Python's multiprocessing.

    Returns:
        The root of the data set, in `out`: coco, or shapes with "_content" or "_alike" for these
        varieties.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: the root exists and is not an empty folder.
        ImportError: layout "coco2017" without Detectron2, which holds the table of categories.
    """
    _check(layout, train, val, size, seed, variety, workers)
    spec = LAYOUTS[layout]
    root = Path(out) / spec.folders[variety]
    _refuse_existing(root)
    things, stuff = _coco_categories() if layout == "coco2017" else (_shape_categories(), [])
    # The processes end first: they must not write to a folder that is being removed.
    with _complete_or_absent(root) as partial, _processes(workers) as run:
        (partial / "annotations").mkdir()
        for split, count in zip(SPLITS, (train, val)):
            task = _Task(partial, layout, split, size or spec.size, seed, variety, things, stuff)
            _write_split(task, count, run)
    return root


def _check(layout, train, val, size, seed, variety, workers) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    varieties = LAYOUTS[layout].folders
    if variety not in varieties:
        raise ValueError(
            f"variety must be one of {', '.join(varieties)} for layout {layout}, got {variety!r}"
        )
    least = {"train": (train, 1), "val": (val, 1), "seed": (seed, 0), "workers": (workers, 1)}
    if size is not None:
        least["size"] = (size, 32)
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


def _refuse_existing(root: Path) -> None:
    if os.path.lexists(root) and (root.is_symlink() or not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and is not an empty folder: remove it or choose another output folder"
        )


@contextlib.contextmanager
def _complete_or_absent(root: Path) -> Iterator[Path]:
    """A folder beside `root` that becomes `root` at the end, or vanishes on any exception."""
    out = root.parent
    new_out = not out.exists()
    partial = out / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
    try:
        partial.mkdir(parents=True)
        yield partial
        _refuse_existing(root)  # another run may have come first
        os.replace(partial, root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if new_out:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


# ---- categories ----------------------------------------------------------------------------------


def _shape_categories() -> list[dict]:
    return [
        {"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES, start=1)
    ]


# The last category id of each of COCO's supercategories.
_SUPERCATEGORIES = {
    "person": 1,
    "vehicle": 9,
    "outdoor": 15,
    "animal": 25,
    "accessory": 33,
    "sports": 43,
    "kitchen": 51,
    "food": 61,
    "furniture": 70,
    "electronic": 77,
    "appliance": 82,
    "indoor": 90,
}


def _coco_categories() -> tuple[list[dict], list[dict]]:
    """COCO's 80 thing and 53 stuff categories; the latter all have the supercategory "stuff"."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    things: list[dict] = []
    stuff: list[dict] = []
    for entry in COCO_CATEGORIES:
        category = {"id": entry["id"], "name": entry["name"], "supercategory": "stuff"}
        if entry["isthing"]:
            parents = (name for name, last in _SUPERCATEGORIES.items() if entry["id"] <= last)
            category["supercategory"] = next(parents)
        (things if entry["isthing"] else stuff).append(category)
    return things, stuff


# ---- images --------------------------------------------------------------------------------------


def _write_image(task: _Task, index: int) -> dict:
    """Draws image `index` of a split; returns its records without annotation ids."""
    # One generator per image, so that neither order nor number of processes matters.
    rng = np.random.default_rng([task.seed, SPLITS.index(task.split), index])
    draw = LAYOUTS[task.layout].draw
    about = {}  # what tells the image from others
    if task.variety == "content":
        content = Content.random(rng)
        scene = draw(rng, task.size, content)
        image = random_camera(rng, scene.image.astype(np.float32))
    else:
        scene = draw(rng, task.size)
        image = scene.image.astype(np.float32)
    if task.variety == "looks":
        about["look"], image = random_look(rng, image)
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    height, width = scene.owner.shape
    image_id = index + 1
    stem = f"{image_id:012d}"
    _save(task.root / task.name / f"{stem}.jpg", image[..., ::-1])

    person_id = task.things[0]["id"] if task.like_coco else None
    annotations = annotate(scene, [thing["id"] for thing in task.things], person_id, rng)
    record = {
        "image": {
            "id": image_id,
            "width": width,
            "height": height,
            "file_name": f"{stem}.jpg",
            "license": 1,
            **about,
        },
        "annotations": [{**entry, "image_id": image_id} for entry in annotations.values()],
    }
    if task.like_coco:
        info = _write_panoptic(task, scene, annotations, stem)
        name = f"{stem}.png"
        record["panoptic"] = {"image_id": image_id, "file_name": name, "segments_info": info}
    return record


def _write_panoptic(task: _Task, scene: Scene, annotations: dict, stem: str) -> list[dict]:
    names = [category["name"] for category in task.stuff]
    rows = [names.index(name) for name in STUFF]
    stuff_ids = [task.stuff[row]["id"] for row in rows]
    # Detectron2 numbers stuff in the order of its ids from 1 on, and gives 0 to all things.
    stuff_labels = [row + 1 for row in rows]
    segments, labels, info = panoptic(scene, annotations, stuff_ids, stuff_labels)
    zeros = np.zeros_like(segments)
    # A segment id is R + 256 G + 65536 B, and OpenCV writes B, G, R.
    _save(task.root / f"panoptic_{task.name}" / f"{stem}.png", np.dstack([zeros, zeros, segments]))
    _save(task.root / f"panoptic_stuff_{task.name}" / f"{stem}.png", labels)
    return info


def _save(path: Path, pixels: np.ndarray) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if path.suffix == ".jpg" else []
    done, data = cv2.imencode(path.suffix, pixels, options)
    if not done:
        raise OSError(f"{path}: cannot encode an image of shape {pixels.shape}")
    path.write_bytes(data.tobytes())  # unlike cv2.imwrite, this raises when the disk is full


# ---- splits --------------------------------------------------------------------------------------


def _write_split(task: _Task, count: int, run: Callable) -> None:
    (task.root / task.name).mkdir()
    if task.like_coco:
        (task.root / f"panoptic_{task.name}").mkdir()
        (task.root / f"panoptic_stuff_{task.name}").mkdir()
    drawn = run(functools.partial(_write_image, task), range(count))
    records = list(tqdm(drawn, task.name, count, disable=None))
    images = [record["image"] for record in records]
    annotations = [entry for record in records for entry in record["annotations"]]
    for annotation_id, entry in enumerate(annotations, start=1):
        entry["id"] = annotation_id
    without_keypoints = [
        {key: value for key, value in entry.items() if "keypoints" not in key}
        for entry in annotations
    ]
    _write_json(task, "instances", images, without_keypoints, task.things)
    if task.like_coco:
        person = {**task.things[0], "keypoints": KEYPOINTS, "skeleton": SKELETON}
        people = [entry for entry in annotations if "keypoints" in entry]
        _write_json(task, "person_keypoints", images, people, [person])
        segments = [record["panoptic"] for record in records]
        kinds = [{**category, "isthing": 1} for category in task.things]
        kinds += [{**category, "isthing": 0} for category in task.stuff]
        _write_json(task, "panoptic", images, segments, kinds)


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Callable]:
    """A `map` that keeps the order and calls the function in `workers` processes."""
    if workers == 1:
        yield map
        return
    # A forked worker can wait forever for a thread of OpenCV or PyTorch that it does not have.
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, fresh, initializer=cv2.setNumThreads, initargs=(1,))

    def pool_map(function: Callable, items: Iterable) -> Iterator:
        # Ctrl-C is for this process to handle: workers start with it blocked, and keep it so.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(function, items, chunksize=8)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    try:
        yield pool_map
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, do not draw what is left


def _write_json(task: _Task, kind: str, images: list, annotations: list, categories: list) -> None:
    content = {
        "info": {
            "description": f"Synthetic scenes: layout {task.layout}, variety {task.variety}",
            "version": f"size {task.size}, seed {task.seed}",
            "contributor": "mabn_d2",
        },
        "licenses": [{"id": 1, "name": "generated images", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = task.root / "annotations" / f"{kind}_{task.name}.json"
    path.write_text(json.dumps(content))
