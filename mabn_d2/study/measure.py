"""What a finished run's folder says about it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.data import MetadataCatalog

from ..data import register_shapes
from ..report.detections import box_ap, found_share, read_annotations
from ..report.metrics import Metrics, read_metrics
from ..report.predictions import PREDICTIONS, read_detections
from .plan import TOOLS, Run

LAST = 5  # evaluations in the column `last_aps`
COLUMNS = {  # of metrics.json, behind the name of a data set
    "box_ap": "bbox/AP",
    "mask_ap": "segm/AP",
    "top1_error": "classification/top1",
}


def measure(run: Run, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Args:
        folder: output folder of the run, which is complete.

    Returns:
        columns of the run's row, and the rows of its learning curve.

    Raises:
        ValueError: the last iteration has not been evaluated.
    """
    metrics = read_metrics(str(folder / "metrics.json"))
    main, others = "", []
    if run.tool is TOOLS["train_net"]:
        # Detectron2 wrote it; it reads it the same way.
        test = list(yaml.unsafe_load((folder / "config.yaml").read_text())["DATASETS"]["TEST"])
        if len(test) > 1:
            main, others = f"{test[0]}/", test[1:]
    curve = _curve(run, metrics, main)
    if not curve:
        raise ValueError(
            f"{folder}/metrics.json holds no evaluation of the data {main or 'at all'}"
        )
    last, decisive = curve[-1], run.tool.metrics[0]
    values: dict[str, Any] = {name: last[name] for name in run.tool.metrics}
    values["iterations"] = _iterations(metrics)
    values["last_aps"] = " ".join(f"{point[decisive]:.1f}" for point in curve[-LAST:])
    if run.tool is TOOLS["train_net"]:
        values["other_aps"] = _pairs(
            {name: _value(metrics, f"{name}/{COLUMNS[decisive]}") for name in others}
        )
        values |= _from_detections(test[0], folder)
    at_start = folder / "at_start.json"
    if at_start.exists():
        results = json.loads(at_start.read_text())
        results = results.get(main.rstrip("/"), results)
        first = {
            name: _number(results[COLUMNS[name].split("/")[0]]["AP"]) for name in run.tool.metrics
        }
        values["ap_at_start"] = first[decisive]
        curve.insert(0, {"iteration": 0, **first})
    return values, curve


def _curve(run: Run, metrics: Metrics, main: str) -> list[dict[str, Any]]:
    """One row per evaluation, with the mean training loss since the one before."""
    curve, losses = [], []
    end = _iterations(metrics)
    for iteration, values in metrics.items():
        if "total_loss" in values:
            losses.append(values["total_loss"])
        if f"{main}{COLUMNS[run.tool.metrics[0]]}" in values:
            point = {name: _number(values[f"{main}{COLUMNS[name]}"]) for name in run.tool.metrics}
            if "top1_error" in point:
                point["top1_error"] = 100 - point["top1_error"]
            loss = float(np.mean(losses)) if losses else ""
            # The last evaluation is written behind the last iteration.
            curve.append({"iteration": min(iteration + 1, end), **point, "loss": loss})
            losses = []
    return curve


def _iterations(metrics: Metrics) -> int:
    return 1 + max((i for i, values in metrics.items() if "total_loss" in values), default=-1)


def _value(metrics: Metrics, key: str) -> float:
    return next((_number(v[key]) for v in reversed(metrics.values()) if key in v), math.nan)


def _number(ap: float) -> float:
    """COCO's evaluation gives no number to a model that finds nothing at all."""
    return 0.0 if math.isnan(ap) else ap


def _pairs(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.2f}" for name, value in values.items())


def read_pairs(text: str) -> dict[str, float]:
    """Of a column with several values, such as `ap_by_look`."""
    return {name: float(value) for name, _, value in (p.partition("=") for p in text.split())}


# ---- detections ----------------------------------------------------------------------------------


def _from_detections(dataset: str, folder: Path) -> dict[str, str]:
    """Box AP by the `look` of the images, and the share of the objects that are found."""
    register_shapes()
    file = folder / PREDICTIONS
    if not file.exists() or not MetadataCatalog.get(dataset).get("json_file"):
        return {}
    coco, detections = read_annotations(dataset), read_detections(str(file))
    values = {"found": f"{100 * found_share(coco, detections):.2f}"}
    looks: dict[str, list[int]] = {}
    for image in coco.dataset["images"]:
        if "look" in image:
            looks.setdefault(image["look"], []).append(image["id"])
    values["ap_by_look"] = _pairs(
        {look: box_ap(coco, detections, ids) for look, ids in sorted(looks.items())}
    )
    return values
