"""Stage `accuracy`: a small Mask R-CNN from scratch with each norm, as long as the time allows."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from ...data import make_synthetic_coco, register_shapes
from ...engine import Trainer
from ...engine.hooks import DoubleForward
from ...layers import marked_options
from ...layers.options import CountsIterations
from ...plugin import NORM_REGISTRY, load_config
from ...utils.results import Results
from .stage import Case, Options, Stage

# Norm and images per step.
RUNS = [("MABN", 2), ("BN", 2), ("BN", 16), ("GN", 2), ("BRN", 2), ("MBN", 2)]
TINY_RUNS = [("MABN", 2), ("BN", 4)]
PACE_STEPS = 30
EVALUATION_SECONDS = 15  # allowed for starting and evaluating a run


def _runs(options: Options) -> list[tuple[str, int]]:
    return TINY_RUNS if options.tiny else RUNS


def cases(options: Options) -> list[Case]:
    return [{"norm": norm, "images": str(images)} for norm, images in _runs(options)]


def measure(case: Case, options: Options) -> Iterator[dict]:
    _prepare_data(options)
    iterations = agreed_iterations(options) or affordable_iterations(options)
    begin = time.monotonic()
    cfg = _config(case["norm"], int(case["images"]), iterations, options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as cfg.OUTPUT_DIR:
        seed_all_rng(cfg.SEED)
        trainer = _SilentTrainer(cfg)
        trainer.train()
    results = trainer._last_eval_results
    yield {
        "iterations": iterations,
        "seed": cfg.SEED,
        "box_ap": results["bbox"]["AP"],
        "mask_ap": results["segm"]["AP"],
        "seconds": time.monotonic() - begin,
    }


def agreed_iterations(options: Options) -> int | None:
    """The length of the runs that are in the results; all have the same."""
    rows = Results(options.out / STAGE.file, STAGE.keys, STAGE.values).rows
    return next((int(row["iterations"]) for row in rows if row["iterations"]), None)


def affordable_iterations(options: Options) -> int:
    """With how many iterations each all runs would end in the time that is left: two digits and zeros."""
    if options.tiny:
        return 8
    runs = _runs(options)
    pace = sum(_seconds_per_iteration(*run, options) for run in runs)
    seconds = options.deadline - time.monotonic() - EVALUATION_SECONDS * len(runs)
    affordable = max(1, int(0.9 * seconds / pace))
    unit = 10 ** max(0, len(str(affordable)) - 2)
    return affordable // unit * unit


def _seconds_per_iteration(norm: str, images: int, options: Options) -> float:
    cfg = _config(norm, images, PACE_STEPS, options)
    clock = _Clock()
    with tempfile.TemporaryDirectory(dir=options.scratch) as cfg.OUTPUT_DIR:
        trainer = _BareTrainer(cfg)
        trainer.register_hooks([clock])
        trainer.train()
    return statistics.median(clock.seconds[PACE_STEPS // 2 :])


class _SilentTrainer(Trainer):
    """Without logs, and so without TensorBoard, which a machine need not have."""

    def build_writers(self):
        return []


class _BareTrainer(_SilentTrainer):
    def build_hooks(self):
        return [hook for hook in super().build_hooks() if isinstance(hook, DoubleForward)]


class _Clock(HookBase):
    """Seconds from the end of each iteration to that of the next."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last = time.monotonic()

    def after_step(self):
        torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self._last = now


def _config(norm: str, images: int, iterations: int, options: Options) -> CfgNode:
    """The demo's with another number of iterations, and what counts them scaled to it."""
    folder = options.root / "configs" / "quick_schedules"
    cfg = load_config(str(folder / f"shapes_mask_rcnn_R_18_FPN_{norm.lower()}.yaml"))
    solver = cfg.SOLVER
    ratio = iterations / solver.MAX_ITER
    for kind, function in NORM_REGISTRY:
        for option in marked_options(function, CountsIterations):
            node = cfg.MODEL[kind]
            node[option.upper()] = _scale(node[option.upper()], ratio)
    solver.STEPS, solver.WARMUP_ITERS = (
        _scale(solver.STEPS, ratio),
        _scale(solver.WARMUP_ITERS, ratio),
    )
    solver.MAX_ITER = solver.CHECKPOINT_PERIOD = iterations
    solver.IMS_PER_BATCH = images
    cfg.TEST.EVAL_PERIOD = 0  # at the end
    cfg.DATALOADER.NUM_WORKERS = 0 if options.tiny else min(4, os.cpu_count() or 1)
    return cfg


def _scale(iterations, ratio: float):
    if isinstance(iterations, int):
        return round(iterations * ratio)
    return tuple(round(iteration * ratio) for iteration in iterations)


def _prepare_data(options: Options) -> None:
    if not (options.scratch / "shapes").exists():
        train, val = (8, 2) if options.tiny else (1000, 200)
        workers = os.cpu_count() or 1
        make_synthetic_coco(options.scratch, layout="shapes", train=train, val=val, workers=workers)
    register_shapes(str(options.scratch))


STAGE = Stage(
    "accuracy",
    "accuracy.csv",
    ("norm", "images"),
    ("iterations", "seed", "box_ap", "mask_ap", "seconds"),
    cases,
    measure,
)
