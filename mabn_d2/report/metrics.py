"""What a run has logged: its metrics and the table of its AP."""

import json
import os
import re
from typing import (
    Any,
)

import numpy as np

METRICS = "metrics.json"
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
Metrics = dict[int, dict[str, float]]


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


def _parse(line: str) -> dict[str, Any] | None:
    """The entry at the end of a line; entries are flat, so it begins at the last brace."""
    try:
        entry = json.loads(line[max(line.rfind("{"), 0) :])
    except ValueError:
        return None
    valid = isinstance(entry, dict) and isinstance(entry.get("iteration"), int)
    return entry if valid else None


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of one metric; all else becomes NaN."""
    points = [(i, values[key]) for i, values in metrics.items() if key in values]
    iterations, values = np.array(points, float).reshape(-1, 2).T
    return iterations, np.where(np.isfinite(values), values, np.nan)


def evaluated(metrics: Metrics, metrics_file: str) -> dict[str, str]:
    """What was evaluated, from metric prefix ("bbox") to name ("box")."""
    tasks = {}
    for key in sorted({key for values in metrics.values() for key in values}):
        match = re.fullmatch(rf"((?:.+/)?)({'|'.join(TASKS)})/AP", key)
        if match:
            dataset, task = match.groups()
            tasks[dataset + task] = dataset.replace("/", " ") + TASKS[task]
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
    tasks = evaluated(metrics, metrics_file)
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
