"""Numbers from the detections that the last evaluation of a run has written."""

import contextlib
import io
import os

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .predictions import PREDICTIONS, SCORE_THRESHOLD, annotations_file, read_detections
from .run import read_config

IOU_THRESHOLD = 0.5


def found_sentence(output_dir: str) -> str:
    """
    What :func:`found_share` is of a run's last evaluation, on the first of its data sets, in words.

    Args:
        output_dir: output folder of a run that was evaluated with Detectron2's `COCOEvaluator`.
            Its data set is registered.

    Raises:
        FileNotFoundError: a file of the run or of the data set is missing.
        ValueError: a file cannot be read, or the data set is not registered as one of COCO's format.
    """
    name = read_config(output_dir).DATASETS.TEST[0]
    detections = read_detections(os.path.join(output_dir, PREDICTIONS))
    share = found_share(read_annotations(name), detections)
    return (
        f"{100 * share:.1f} % of the objects of {name} are found, by a box of their class with a score of at "
        f"least {SCORE_THRESHOLD} and an IoU of at least {IOU_THRESHOLD}"
    )


def read_annotations(name: str) -> COCO:
    """
    The ground truth of a registered data set.

    Raises:
        FileNotFoundError: its file is missing.
        ValueError: it is not registered, or not with a file in COCO's format.
    """
    path = annotations_file(name)
    if not path:
        raise ValueError(f"the data set {name} is not registered with a file in COCO's format")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def box_ap(coco: COCO, detections: list[dict], images: list[int]) -> float:
    """COCO's AP of boxes, in percent, on some of the images; NaN if there is no object in them."""
    evaluation = _evaluate(coco, detections, images)
    if evaluation is None:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    ap = float(evaluation.stats[0])
    return 100 * ap if ap >= 0 else float("nan")


def found_share(
    coco: COCO, detections: list[dict], score: float = SCORE_THRESHOLD, iou: float = IOU_THRESHOLD
) -> float:
    """The share of all objects that a box of the right class covers with this score and IoU or more."""
    confident = [detection for detection in detections if detection["score"] >= score]
    evaluation = _evaluate(coco, confident, coco.getImgIds(), [iou])
    if evaluation is None:
        return 0.0
    everything = evaluation.params.areaRng[0]
    cells = [e for e in evaluation.evalImgs if e is not None and e["aRng"] == everything]
    counted = [np.logical_not(e["gtIgnore"]) for e in cells]
    found = sum(int(((e["gtMatches"][0] > 0) & c).sum()) for e, c in zip(cells, counted))
    return found / max(1, sum(int(c.sum()) for c in counted))


def _evaluate(
    coco: COCO, detections: list[dict], images: list[int], ious: list[float] | None = None
) -> COCOeval | None:
    chosen = set(images)
    detections = [dict(d) for d in detections if d["image_id"] in chosen]
    if not detections:  # pycocotools fails on none
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.params.imgIds = images
        if ious:
            evaluation.params.iouThrs = np.array(ious)
        evaluation.evaluate()
    return evaluation
