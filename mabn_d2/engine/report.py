"""
Pictures and a table of a training run, made from its output folder.

The pictures need matplotlib; everything else in the package works without it.
"""
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pycocotools.mask as mask_util

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from ..checkpoint import atomic_write
from ..config import add_mabn_config

METRICS = "metrics.json"
PREDICTIONS = os.path.join("inference", "coco_instances_results.json")
SCORE_THRESHOLD = 0.5  # detections with a lower score are not drawn
BEST = 3  # detections drawn of an image without one above the threshold

_TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
_DPI = 100
_GREY = "0.4"
# Vivid colours, to be seen on all backgrounds.
_COLOURS = (
    "#1e9bff", "#ff9500", "#2fd158", "#ff453a", "#bf5af2",
    "#ffd60a", "#00d8d8", "#ff5fa8", "#a5e05a", "#d0a070",
)  # fmt: skip

Metrics = Dict[int, Dict[str, float]]


# ---- metrics -------------------------------------------------------------------------------------


def read_metrics(metrics_file: str) -> Metrics:
    """
    What Detectron2's `JSONWriter` has written, by iteration, in ascending order.

    A run that is killed may leave half a line, and a resumed one goes on in that very line and
    writes some iterations again: unreadable text is skipped and later values replace earlier ones.
    If training started over, what the earlier run recorded beyond the later one is dropped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not os.path.isfile(metrics_file):
        raise FileNotFoundError(
            f"{metrics_file} is missing: its folder is not the output folder of a training run"
        )
    metrics: Metrics = {}
    latest = -1
    with open(metrics_file, encoding="utf-8", errors="replace") as f:
        for entry in filter(None, map(_parse, f)):
            iteration = entry.pop("iteration")
            # Within one run, losses come in order. Evaluations may come late.
            if "total_loss" in entry:
                if iteration <= latest:
                    metrics = {i: values for i, values in metrics.items() if i <= iteration}
                latest = iteration
            metrics.setdefault(iteration, {}).update(entry)
    return dict(sorted(metrics.items()))


def _parse(line: str) -> Optional[Dict[str, Any]]:
    """The entry at the end of a line; entries are flat, so it begins at the last brace."""
    try:
        entry = json.loads(line[max(line.rfind("{"), 0) :])
    except ValueError:
        return None
    valid = isinstance(entry, dict) and isinstance(entry.get("iteration"), int)
    return entry if valid else None


def _series(metrics: Metrics, key: str) -> Tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of one metric; all else becomes NaN."""
    points = [(i, values[key]) for i, values in metrics.items() if key in values]
    iterations, values = np.array(points, float).reshape(-1, 2).T
    return iterations, np.where(np.isfinite(values), values, np.nan)


def _evaluated(metrics: Metrics, metrics_file: str) -> Dict[str, str]:
    """What was evaluated, from metric prefix ("bbox") to name ("box")."""
    tasks = {}
    for key in sorted({key for values in metrics.values() for key in values}):
        match = re.fullmatch(rf"((?:.+/)?)({'|'.join(_TASKS)})/AP", key)
        if match:
            dataset, task = match.groups()
            tasks[dataset + task] = dataset.replace("/", " ") + _TASKS[task]
    if not tasks:
        raise ValueError(f"{metrics_file} holds no evaluation yet (see TEST.EVAL_PERIOD)")
    return tasks


def ap_table(metrics_file: str) -> str:
    """
    The AP of the last evaluation, in percent, as a Markdown table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no evaluation in the file.
    """
    metrics = read_metrics(metrics_file)
    tasks = _evaluated(metrics, metrics_file)
    last = max(i for i, values in metrics.items() if any(f"{task}/AP" in values for task in tasks))
    columns = ("AP", "AP50", "AP75")
    rows = [[f"iteration {last}", *columns]]
    for task, name in tasks.items():
        if f"{task}/AP" in metrics[last]:
            values = [metrics[last].get(f"{task}/{column}", np.nan) for column in columns]
            rows.append([name, *("-" if np.isnan(v) else f"{v:.2f}" for v in values)])
    widths = [max(5, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    return "\n".join(
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        + " |"
        for row in rows
    )


# ---- the run -------------------------------------------------------------------------------------


def _read_config(output_dir: str) -> CfgNode:
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: it is written when training starts")
    cfg = get_cfg()
    add_mabn_config(cfg)
    try:
        cfg.merge_from_file(path)
    except Exception as e:  # of many types: wrong syntax, unknown keys, values of another type
        raise ValueError(f"{path} is not the config of a run: {e}") from e
    return cfg


def describe_model(cfg: CfgNode) -> str:
    """Architecture and norms in words, like "Mask R-CNN R18-FPN, norm MABN"."""
    model = cfg.MODEL
    name = model.META_ARCHITECTURE
    if name == "GeneralizedRCNN":
        kinds = (model.MASK_ON, "Mask"), (model.KEYPOINT_ON, "Keypoint"), (True, "Faster")
        name = next(kind for on, kind in kinds if on) + " R-CNN"
    if "resnet" in model.BACKBONE.NAME:
        name += f" R{model.RESNETS.DEPTH}" + "-FPN" * ("fpn" in model.BACKBONE.NAME)
    norms = [model.RESNETS.NORM]
    if "fpn" in model.BACKBONE.NAME:
        norms.append(model.FPN.NORM)
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        norms.append(model.ROI_BOX_HEAD.NORM)
        norms += [model.ROI_MASK_HEAD.NORM] * model.MASK_ON
    return f"{name}, norm {' / '.join(dict.fromkeys(norm or 'none' for norm in norms))}"


# ---- pictures ------------------------------------------------------------------------------------


def _new_figure(width: float, height: float, **options):
    """An empty figure of a size in inches, apart from pyplot and its global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, picture: str) -> None:
    with atomic_write(os.fspath(picture)) as f:
        figure.savefig(f, format="png", dpi=_DPI)


def smooth(values: np.ndarray) -> np.ndarray:
    """
    Bell-shaped means over a twentieth of the points to either side.

    NaN values stay NaN and do not count; less than 20 points stay as they are.
    """
    reach = len(values) // 20
    if not reach:
        return values
    weights = np.exp(-2 * (np.arange(-reach, reach + 1) / reach) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), weights, "same")
    count = np.convolve(known.astype(float), weights, "same")
    return np.where(known, total / np.maximum(count, weights[reach]), np.nan)


def plot_curves(metrics_file: str, picture: str) -> None:
    """
    Draws losses and AP over the iterations.

    Args:
        metrics_file: `metrics.json` of a run; the title comes from the `config.yaml` beside it.
        picture: PNG file to write.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: there are no losses or no evaluation in the file.
        ImportError: matplotlib is not installed.
    """
    metrics = read_metrics(metrics_file)
    tasks = _evaluated(metrics, metrics_file)
    components = sorted({k for values in metrics.values() for k in values if k.startswith("loss_")})
    if not any("total_loss" in values for values in metrics.values()):
        raise ValueError(f"{metrics_file} holds no losses")
    cfg = _read_config(os.path.dirname(metrics_file))

    figure = _new_figure(10, 7.5, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.04)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(describe_model(cfg), fontsize=13, fontweight="bold")
    _plot_losses(top, {key: _series(metrics, key) for key in ("total_loss", *components)})
    _plot_ap(bottom, {name: _series(metrics, f"{task}/AP") for task, name in tasks.items()})
    bottom.set_xlabel(f"iteration ({_count(cfg.SOLVER.IMS_PER_BATCH, 'image')} each)")
    bottom.set_xlim(left=0)
    for axes in (top, bottom):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    _save(figure, picture)


def _plot_losses(axes, losses: Dict[str, Tuple[np.ndarray, np.ndarray]]) -> None:
    is_smoothed = False
    for number, (name, (iterations, values)) in enumerate(losses.items()):
        style = {"color": f"C{number - 1}", "linewidth": 1.4}
        if name == "total_loss":
            style = {"color": "black", "linewidth": 2.2}
        smoothed = smooth(values)
        if not np.array_equal(smoothed, values, equal_nan=True):
            axes.plot(iterations, values, **{**style, "linewidth": 0.8, "alpha": 0.3})
            is_smoothed = True
        axes.plot(iterations, smoothed, label=name, **style)
    if is_smoothed:
        axes.plot([], [], color=_GREY, linewidth=0.8, alpha=0.5, label="not smoothed")
    finite = np.concatenate([values[np.isfinite(values)] for _, values in losses.values()])
    if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("training loss (log scale)")
    else:
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=min(0, finite.min(initial=0)))


def _plot_ap(axes, curves: Dict[str, Tuple[np.ndarray, np.ndarray]]) -> None:
    for number, (name, (iterations, values)) in enumerate(curves.items()):
        last = "-" if np.isnan(values[-1]) else f"{values[-1]:.1f} %"
        label, marker = f"{name} AP, last {last}", "osD^v"[number % 5]
        # Markers at the frame would be cut in half.
        axes.plot(iterations, values, label=label, marker=marker, linewidth=1.8, clip_on=False)
    axes.set_ylabel("validation AP (%)")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))


@dataclass
class _Object:
    """A thing in an image: ground truth if it has no score."""

    category: int
    box: Sequence[float]  # x0, y0, x1, y1 in pixels
    mask: Optional[np.ndarray] = None  # (H, W), non-zero inside
    score: Optional[float] = None
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
    if num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")
    cfg = _read_config(output_dir)
    detections = _read_detections(os.path.join(output_dir, PREDICTIONS))
    name = cfg.DATASETS.TEST[-1]  # the detections of further data sets replace those of the first
    records = _load_dataset(name)
    metadata = MetadataCatalog.get(name)
    pairs = []
    for record in _choose(records, num_images, seed):
        found = [_detected(entry, metadata) for entry in detections[record["image_id"]]]
        pairs.append((record, [_annotated(a, record) for a in record["annotations"]], found))
    title = f"{describe_model(cfg)}, on {name}"
    _save(_draw_panel(pairs, list(metadata.thing_classes), title), picture)


def _read_detections(path: str) -> Dict[Any, List[dict]]:
    """COCO results by image id."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing: it is written when a COCO data set is evaluated"
        )
    by_image = defaultdict(list)
    try:
        with open(path) as f:
            for entry in json.load(f):
                by_image[entry["image_id"]].append(entry)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} does not hold COCO results: {e}") from e
    return by_image


def _load_dataset(name: str) -> List[dict]:
    if name not in DatasetCatalog.list():
        raise ValueError(f"the data set {name} of the run is not registered")
    path = MetadataCatalog.get(name).get("json_file")
    if path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} of the data set {name} is missing: set DETECTRON2_DATASETS"
        )
    records = [record for record in DatasetCatalog.get(name) if "annotations" in record]
    if not records:
        raise ValueError(f"the data set {name} holds no annotated image")
    return records


def _choose(records: List[dict], count: int, seed: int) -> List[dict]:
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _select(found: List[_Object]) -> Tuple[List[_Object], str]:
    """The detections to draw, best first, and the caption that says which they are."""
    found = sorted(found, key=lambda detection: -detection.score)
    shown = [detection for detection in found if detection.score >= SCORE_THRESHOLD]
    if shown:
        return shown, f"{_count(len(shown), 'detection')} of score ≥ {SCORE_THRESHOLD}"
    if found:
        best = found[:BEST]
        return best, f"none of score ≥ {SCORE_THRESHOLD}, the best {len(best)} shown"
    return [], "no detections"


def _draw_panel(pairs: List[Tuple[dict, list, list]], classes: List[str], title: str):
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

    figure = _new_figure(width / _DPI, height / _DPI)
    figure.text(0.5, 1 - 28 / height, title, ha="center", va="center", fontsize=14, weight="bold")
    for number, (record, truth, found) in enumerate(pairs):
        row, column = divmod(number, across)
        shown, remark = _select(found)
        remarks = f"image {record['image_id']}: {_count(len(truth), 'object')}", remark
        image = read_image(record["file_name"], "RGB")
        w, h = sizes[number]
        bottom = height - header - sum(rows[:row]) - caption * row - h
        for half, objects in enumerate((truth, shown)):
            left = margin + column * pair_width + half * (cell + gap) + (cell - w) / 2
            axes = figure.add_axes((left / width, bottom / height, w / width, h / height))
            _draw_objects(axes, image, scales[number], objects, classes)
            axes.set_xlabel(remarks[half], fontsize=10, color=_GREY, labelpad=5)
            if row == 0:
                axes.set_title(("ground truth", "prediction")[half], fontsize=12, pad=8)
    return figure


def _draw_objects(axes, image: np.ndarray, scale: float, objects: List[_Object], classes) -> None:
    """Draws on axes that are `scale` times as large as the image, in pixels."""
    height, width = scale * image.shape[0], scale * image.shape[1]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bicubic")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for thing in sorted(objects, key=lambda thing: -_area(thing.box)):
        _draw_shape(axes, thing, scale, _colour(thing.category, len(classes)))
    taken: List[Tuple[float, ...]] = []
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
    colour = _colour(thing.category, len(classes))
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 0.5
    label = axes.text(
        0, 0, text, fontsize=9, va="top", color="white" if dark else "black",
        bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.9, "pad": 1.5},
    )  # fmt: skip
    extent = label.get_window_extent(axes.figure.canvas.get_renderer())
    pad = 1.5 * _DPI / 72
    size = extent.width + 2 * pad, extent.height + 2 * pad
    frame = axes.get_xlim()[1], axes.get_ylim()[0]
    x, y = _place(size, np.multiply(thing.box, scale), frame, taken)
    label.set_position((x + pad, y + pad))
    taken.append((x, y, x + size[0], y + size[1]))


def _place(size, box, frame, taken) -> Tuple[float, float]:
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


def _colour(category: int, classes: int) -> Tuple[float, ...]:
    """RGB of a class: one of ten that differ well, or else spread around the colour circle."""
    from matplotlib import colors

    if classes <= len(_COLOURS):
        return colors.to_rgb(_COLOURS[category])
    golden = 0.618034
    return tuple(colors.hsv_to_rgb((category * golden % 1, 0.85, (0.95, 0.75)[category % 2])))
