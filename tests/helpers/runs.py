"""Runs of the trainer, and what they leave behind."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from mabn_d2.data import register_shapes
from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config
from mabn_d2.training import norm_statistics

from . import INSTANT


def environment(datasets):
    """For a process that trains on the data sets of a folder."""
    return {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}


def weights(output, name="model_final.pth"):
    return torch.load(Path(output) / name)["model"]


def assert_same_run(a, b):
    """The output folders hold the same weights and the same last metrics, to the bit."""
    for key, value in weights(a).items():
        assert torch.equal(value, weights(b)[key]), key
    last = [json.loads((Path(o) / "metrics.json").read_text().splitlines()[-1]) for o in (a, b)]
    for key in last[0]:
        if "loss" in key or "AP" in key:
            np.testing.assert_equal(last[0][key], last[1][key], key)


def cfg_for(datasets, output, *options):
    """Of a run in this process on the data sets of a folder."""
    cfg = load_config(str(INSTANT))
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", *options])
    os.environ["DETECTRON2_DATASETS"] = str(datasets)
    register_shapes(str(datasets))
    Path(output).mkdir(exist_ok=True)
    return cfg


def train_a_worker(datasets, output, iterations, *options):
    """Statistics of this worker after a few iterations, before and after they are averaged."""
    cfg = cfg_for(datasets, output, "SOLVER.IMS_PER_BATCH", "4", "TEST.EVAL_PERIOD", "0", *options)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    before = []
    sync = next(h for h in trainer._hooks if type(h).__name__ == "SyncNormStatistics")
    after_step = sync.after_step

    def spy():
        before[:] = [s.clone() for s in norm_statistics(trainer.model)]
        after_step()

    sync.after_step = spy
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.max_iter = iterations
    trainer.train()
    after = [s.clone() for s in norm_statistics(trainer.model)]
    model = getattr(trainer.model, "module", trainer.model).state_dict()
    return before, after, model
