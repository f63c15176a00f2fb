"""Mask R-CNN with each norm through tools/train_net.py: it trains and evaluates, and no step of ours waits."""

import json
import math
import runpy
import sys

import pytest

from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer

from . import compute, record
from .__main__ import ROOT
from .conditions import NORMS

TOOL = str(ROOT / "tools/train_net.py")
CONFIG = ROOT / "configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
SIZE = 128
STEPS = 3
NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, layout="shapes", train=4, val=2, size=SIZE)
    return folder


@pytest.fixture
def steps(monkeypatch):
    """What the device is asked in each step of a trainer, and by the hooks that follow it."""
    logs = []

    def recorded(method):
        def call(trainer):
            with record(stacks=True) as log:
                method(trainer)
            logs.append(log)

        return call

    for name in ("run_step", "after_step"):
        monkeypatch.setattr(Trainer, name, recorded(getattr(Trainer, name)))
    return logs


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed precision"])
@pytest.mark.parametrize("norm", [*NORMS, "GN", "FrozenBN"])
def test_mask_rcnn_trains_and_evaluates_and_no_step_of_ours_waits(
    shapes, steps, monkeypatch, tmp_path, norm, mixed
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    norm, *lag = norm.split(", LAG ")
    options = {f"MODEL.{key}.NORM": norm for key in NORM_KEYS} | {
        "MODEL.MABN.LAG": int(lag[0]) if lag else 0,
        "INPUT.MIN_SIZE_TRAIN": (SIZE,),
        "INPUT.MAX_SIZE_TRAIN": SIZE,
        "INPUT.MIN_SIZE_TEST": SIZE,
        "INPUT.MAX_SIZE_TEST": SIZE,
        "SOLVER.AMP.ENABLED": mixed,
        "SOLVER.MAX_ITER": STEPS,
        "OUTPUT_DIR": tmp_path,
    }
    opts = [str(item) for pair in options.items() for item in pair]
    monkeypatch.setattr(sys, "argv", [TOOL, "--config-file", str(CONFIG), *opts])
    with compute():
        runpy.run_path(TOOL, run_name="__main__")
    metrics = {}
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        metrics.update(json.loads(line))
    assert math.isfinite(metrics["total_loss"])
    assert metrics["bbox/AP"] >= 0 and metrics["segm/AP"] >= 0
    assert len(steps) == 2 * STEPS and all(log.launches > 500 for log in steps[::2])
    for log in steps[2:-1]:  # the first step sets things up, the last one ends in an evaluation
        assert not log.within("mabn_d2/").waits()
