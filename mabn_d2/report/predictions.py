"""Pictures of detections beside the ground truth."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances

from .canvas import DPI, GREY, class_colour, kind_of, new_figure, save
from .run import count, describe_model, read_config

PREDICTIONS = os.path.join("inference", "coco_instances_results.json")
SCORE_THRESHOLD = 0.5  # detections with a lower score are not drawn
BEST = 3  # detections drawn of an image without one above the threshold


@dataclass
class _Object:
    """A thing in an image: ground truth if it has no score."""

    category: int
    box: Sequence[float]  # x0, y0, x1, y1 in pixels
    mask: np.ndarray | None = None  # (H, W), non-zero inside
    score: float | None = None
    crowd: bool = False


def draw_predictions(output_dir: str, picture: str, num_images: int = 6, seed: int = 0) -> None:
    """
    Draws validation images, with ground truth and what the last evaluation detected side by side.

    Detections with a score of at least 0.5 are drawn, the best three of an image if there is none;
    the caption says which.

    Args:
        output_dir: output folder of a run that was evaluated with Detectron2's `COCOEvaluator`.
            Its data set is registered.
        picture: PNG file to write.
        num_images: number of images, spread over the data set. Those of 2 to 6 objects come first.
        seed: of the choice of images.

    Raises:
        FileNotFoundError: a file of the run or of the data set is missing.
        ValueError: a file cannot be read, the data set is not registered, or an argument is out of
            range.
        ImportError: matplotlib is not installed.
    """
    cfg = read_config(output_dir)
    detections = defaultdict(list)
    for entry in read_detections(os.path.join(output_dir, PREDICTIONS)):
        detections[entry["image_id"]].append(entry)
    name = cfg.DATASETS.TEST[0]  # the detections of further data sets are in folders of their own
    metadata = MetadataCatalog.get(name)

    def found(record: dict) -> list[_Object]:
        return [_detected(entry, metadata) for entry in detections[record["image_id"]]]

    _compare(name, found, picture, describe_model(cfg), num_images, seed)


def draw_comparison(
    name: str,
    detect: Callable[[dict], Instances],
    picture: str,
    model: str,
    num_images: int = 6,
    threshold: float = SCORE_THRESHOLD,
) -> None:
    """
    :func:`draw_predictions` of a model that runs now.

    Args:
        name: of a registered data set.
        detect: takes a record of the data set, and gives what the model detects in its image.
        picture: PNG or SVG file to write.
        model: in words, for the title.
        num_images: as there.
        threshold: least score of the detections to draw.

    Raises:
        As there.
    """
    _compare(
        name,
        lambda record: _objects(detect(record)),
        picture,
        model,
        num_images,
        threshold=threshold,
    )


def _compare(
    name: str,
    found: Callable[[dict], list[_Object]],
    picture: str,
    model: str,
    num_images: int,
    seed: int = 0,
    threshold: float = SCORE_THRESHOLD,
) -> None:
    if num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")
    kind_of(picture)
    records = _choose(_load_dataset(name), num_images, seed)
    truth = [[_annotated(a, record) for a in record["annotations"]] for record in records]
    pairs = list(zip(records, truth, map(found, records)))
    classes = list(MetadataCatalog.get(name).thing_classes)
    save(_draw_panel(pairs, classes, f"{model}, on {name}", threshold), picture)


def read_detections(path: str) -> list[dict[str, Any]]:
    """
    COCO results.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is something else in it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing: it is written when a COCO data set is evaluated"
        )
    needed = {"image_id", "category_id", "bbox", "score"}
    try:
        with open(path) as f:
            detections = json.load(f)
        if not all(needed <= set(entry) for entry in detections):
            raise ValueError(f"expected are entries with {', '.join(sorted(needed))}")
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} does not hold COCO results: {e}") from e
    return detections


def annotations_file(name: str) -> str | None:
    """
    The file with a data set's annotations, None if it has none.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: the data set is not registered.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(f"the data set {name} is not registered")
    path = MetadataCatalog.get(name).get("json_file")
    if path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} of the data set {name} is missing: set DETECTRON2_DATASETS"
        )
    return path


def _load_dataset(name: str) -> list[dict]:
    annotations_file(name)
    records = [record for record in DatasetCatalog.get(name) if "annotations" in record]
    if not records:
        raise ValueError(f"the data set {name} holds no annotated image")
    return records


def _choose(records: list[dict], count: int, seed: int) -> list[dict]:
    """One record from each of `count` stretches of the data set."""
    rng = np.random.default_rng(seed)
    chosen = []
    for stretch in np.array_split(np.arange(len(records)), min(count, len(records))):
        few = [i for i in stretch if 2 <= len(records[i]["annotations"]) <= 6]
        chosen.append(records[rng.choice(few or stretch)])
    return chosen


def _annotated(annotation: dict, record: dict) -> _Object:
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        mask = mask_util.merge(mask_util.frPyObjects(mask, record["height"], record["width"]))
    mask = mask_util.decode(mask) if mask else None
    crowd = bool(annotation.get("iscrowd", 0))
    return _Object(annotation["category_id"], box, mask, crowd=crowd)


def _detected(entry: dict, metadata) -> _Object:
    box = BoxMode.convert(entry["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    mask = mask_util.decode(entry["segmentation"]) if "segmentation" in entry else None
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
    category = numbers.get(entry["category_id"], entry["category_id"])
    return _Object(category, box, mask, entry["score"])


def _objects(instances: Instances) -> list[_Object]:
    """Of Detectron2's detections in the size of their image."""
    fields = instances.to("cpu").get_fields()
    boxes, classes = fields["pred_boxes"].tensor.numpy(), fields["pred_classes"].tolist()
    masks = fields["pred_masks"].numpy() if "pred_masks" in fields else [None] * len(boxes)
    return [_Object(*thing) for thing in zip(classes, boxes, masks, fields["scores"].tolist())]


def draw_detections(
    image: np.ndarray, instances: Instances, classes: Sequence[str], scale: float
) -> np.ndarray:
    """
    Draws detections as :func:`draw_predictions` does; a class has the same colour in all images.

    Args:
        image: shape (H, W, 3), uint8, RGB.
        instances: what Detectron2 detects in it.
        classes: names of all classes.
        scale: of the result against the image; labels keep their size.

    Returns:
        Shape (scale·H, scale·W, 3), uint8, RGB.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a class has no name.
    """
    height, width = (round(scale * n) for n in image.shape[:2])
    figure = new_figure((width + 1e-4) / DPI, (height + 1e-4) / DPI)
    _draw_objects(figure.add_axes((0, 0, 1, 1)), image, scale, _objects(instances), classes)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


def _select(found: list[_Object], threshold: float = SCORE_THRESHOLD) -> tuple[list[_Object], str]:
    """The detections to draw, best first, and the caption that says which they are."""
    found = sorted(found, key=lambda detection: -detection.score)  # type: ignore[operator]
    shown = [detection for detection in found if detection.score >= threshold]  # type: ignore[operator]
    if shown:
        return shown, f"{count(len(shown), 'detection')} of score ≥ {threshold}"
    if found:
        best = found[:BEST]
        return best, f"none of score ≥ {threshold}, the best {len(best)} shown"
    return [], "no detections"


def _draw_panel(
    pairs: list[tuple[dict, list, list]], classes: list[str], title: str, threshold: float
):
    """A figure with two images in a row, and ground truth and detections of each."""
    sizes = np.array([(record["width"], record["height"]) for record, _, _ in pairs], float)
    # Pixels; small images are enlarged so that labels are small against the objects.
    scales = np.clip(3 * sizes.max(), 384, 560) / sizes.max(axis=1)
    sizes *= scales[:, None]
    across = min(2, len(pairs))
    cell = sizes[:, 0].max()
    rows = [sizes[i : i + across, 1].max() for i in range(0, len(pairs), across)]
    margin, gap, caption, header = 32, 8, 44, 84
    pair_width = 2 * cell + gap + margin
    width, height = across * pair_width + margin, header + sum(rows) + caption * len(rows)

    figure = new_figure(width / DPI, height / DPI)
    figure.text(0.5, 1 - 28 / height, title, ha="center", va="center", fontsize=14, weight="bold")
    for number, (record, truth, found) in enumerate(pairs):
        row, column = divmod(number, across)
        shown, remark = _select(found, threshold)
        remarks = f"image {record['image_id']}: {count(len(truth), 'object')}", remark
        image = read_image(record["file_name"], "RGB")
        w, h = sizes[number]
        bottom = height - header - sum(rows[:row]) - caption * row - h
        for half, objects in enumerate((truth, shown)):
            left = margin + column * pair_width + half * (cell + gap) + (cell - w) / 2
            axes = figure.add_axes((left / width, bottom / height, w / width, h / height))
            _draw_objects(axes, image, scales[number], objects, classes)
            axes.set_xlabel(remarks[half], fontsize=10, color=GREY, labelpad=5)
            if row == 0:
                axes.set_title(("ground truth", "prediction")[half], fontsize=12, pad=8)
    return figure


def _draw_objects(axes, image: np.ndarray, scale: float, objects: list[_Object], classes) -> None:
    """Draws on axes that are `scale` times as large as the image, in pixels."""
    highest = max((thing.category for thing in objects), default=0)
    if highest >= len(classes):
        raise ValueError(f"the model finds class {highest}, the data set names {len(classes)}")
    height, width = scale * image.shape[0], scale * image.shape[1]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bicubic")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for thing in sorted(objects, key=lambda thing: -_area(thing.box)):
        _draw_shape(axes, thing, scale, class_colour(thing.category, len(classes)))
    taken: list[tuple[float, ...]] = []
    for thing in sorted(objects, key=lambda thing: _area(thing.box)):
        _draw_label(axes, thing, scale, classes, taken)


def _draw_shape(axes, thing: _Object, scale: float, colour) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x0, y0, x1, y1 = np.multiply(thing.box, scale)
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1)
    box.set_path_effects([withStroke(linewidth=2, foreground="black", alpha=0.4)])
    axes.add_patch(box)
    if thing.mask is None or not thing.mask.any():
        return
    padded = np.pad(thing.mask, 1).astype(float)  # so that outlines are closed at the border
    ys, xs = ((np.arange(n) - 0.5) * scale for n in padded.shape)
    axes.contourf(xs, ys, padded, levels=[0.5, 2], colors=[colour], alpha=0.4)
    for colours, width in ("black", 2.8), ([colour], 1.8):
        axes.contour(xs, ys, padded, levels=[0.5], colors=colours, linewidths=width)


def _draw_label(axes, thing: _Object, scale: float, classes, taken: list) -> None:
    """Writes class and score where no label is yet; `taken` lists the boxes of all labels."""
    name = classes[thing.category] + " (crowd)" * thing.crowd
    text = name if thing.score is None else f"{name} {thing.score:.2f}"
    colour = class_colour(thing.category, len(classes))
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 0.5
    label = axes.text(
        0, 0, text, fontsize=9, va="top", color="white" if dark else "black",
        bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.9, "pad": 1.5},
    )  # fmt: skip
    extent = label.get_window_extent(axes.figure.canvas.get_renderer())
    pad = 1.5 * DPI / 72
    size = extent.width + 2 * pad, extent.height + 2 * pad
    frame = axes.get_xlim()[1], axes.get_ylim()[0]
    x, y = _place(size, np.multiply(thing.box, scale), frame, taken)
    label.set_position((x + pad, y + pad))
    taken.append((x, y, x + size[0], y + size[1]))


def _place(size, box, frame, taken) -> tuple[float, float]:
    """The upper left corner, in the frame, of a label of the box that covers least of the taken."""
    (width, height), (x0, y0, x1, y1) = size, box
    spots = [(x, y) for y in (y0 - height, y1, y0, y1 - height) for x in (x0, x1 - width)]
    rows = np.arange(0, frame[1] - height, height / 2)
    spots += [(x0, y) for y in sorted(rows, key=lambda y: abs(y - y0))]
    inside = [
        (float(np.clip(x, 0, max(frame[0] - width, 0))), float(np.clip(y, 0, frame[1] - height)))
        for x, y in spots
    ]
    return min(inside, key=lambda spot: _covered((*spot, spot[0] + width, spot[1] + height), taken))


def _covered(box, others) -> float:
    """Area of the box's overlaps with the others."""
    area = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        area += max(width, 0) * max(height, 0)
    return area


def _area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
