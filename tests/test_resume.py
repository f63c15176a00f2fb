"""Runs that are resumed where something has changed since: the machine, the workers, the schedule."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.utils import comm

from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer

from .helpers import INSTANT, ROOT, version_0_1_0
from .helpers.runs import environment
from .helpers.version_0_1_0 import CHECKPOINT, CHECKPOINT_ITERS, FOLDER, MAX_ITER
from .helpers.workers import run_workers


@pytest.fixture
def images(tmp_path_factory):
    version_0_1_0.register_images(tmp_path_factory.mktemp("tiny"))


def tiny_trainer(output, max_iter=MAX_ITER):
    cfg = version_0_1_0.detector_config("MABN", output)
    cfg.SOLVER.MAX_ITER = max_iter
    return Trainer(cfg)


# ------------------------------------------------------------------------------------------ machines


def train_on_a_machine_of_its_own(folder):
    """What one worker began with and ended with, or the error; its output is in folder/RANK."""
    output = folder / str(comm.get_rank())
    output.mkdir(exist_ok=True)
    version_0_1_0.register_images(output)
    torch.manual_seed(0)
    trainer = tiny_trainer(output)
    try:
        trainer.resume_or_load(resume=True)
    except ValueError as error:
        return str(error)
    trainer.train()
    return trainer.start_iter, trainer.model.module.state_dict()


@pytest.mark.slow
def test_machines_without_a_shared_disk_resume_from_the_checkpoint_of_the_first(tmp_path):
    rendezvous = iter([tmp_path / "first", tmp_path / "second", tmp_path / "third"])

    def run_both():
        folder = next(rendezvous)
        folder.mkdir()
        return run_workers(2, train_on_a_machine_of_its_own, folder, tmp_path)

    whole = run_both()
    first, second = tmp_path / "0", tmp_path / "1"
    assert (first / CHECKPOINT).exists() and not (second / "last_checkpoint").exists()
    (first / "model_final.pth").unlink()  # as if the job had been killed at iteration 6
    (first / "last_checkpoint").write_text(CHECKPOINT)
    resumed = run_both()
    for (begun_at, state), (_, expected) in zip(resumed, whole):
        assert begun_at == CHECKPOINT_ITERS
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name

    (first / "last_checkpoint").write_text(CHECKPOINT)
    (first / CHECKPOINT).write_bytes(b"damaged")
    errors = run_both()  # no worker waits for the other
    assert errors[0] == errors[1] and "is no checkpoint" in errors[0]


# ------------------------------------------------------------------------------------------- workers


def test_a_run_is_not_resumed_with_another_number_of_workers(images, tmp_path):
    shutil.copytree(FOLDER / "MABN", tmp_path / "output")
    path = tmp_path / "output" / CHECKPOINT
    checkpoint = torch.load(path)
    checkpoint["trainer"]["num_workers"] = 4
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="trained by 4 workers, it cannot go on with 1:"):
        tiny_trainer(tmp_path / "output").resume_or_load(resume=True)


def test_a_checkpoint_says_how_many_workers_there_were(images, tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.iter = 0
    trainer.checkpointer.save("model_0000000")
    assert torch.load(tmp_path / "model_0000000.pth")["trainer"]["num_workers"] == 1


# ------------------------------------------------------------------------------------------ schedule


def test_a_run_that_is_longer_than_the_schedule_is_refused_and_stays_what_it_is(images, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(FOLDER / "MABN", output)
    trainer = tiny_trainer(output, max_iter=CHECKPOINT_ITERS - 2)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(
        ValueError, match="is of 6 iterations, and the run ends after 4: .* 6 or more"
    ):
        trainer.resume_or_load(resume=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_run_that_ends_where_it_was_stopped_can_be_prolonged(images, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(FOLDER / "MABN", output)
    trainer = tiny_trainer(output, max_iter=CHECKPOINT_ITERS)
    trainer.resume_or_load(resume=True)
    trainer.train()
    final = torch.load(output / "model_final.pth")
    assert final["iteration"] == final["trainer"]["iteration"] == CHECKPOINT_ITERS - 1
    trainer = tiny_trainer(output)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == CHECKPOINT_ITERS
    trainer.train()
    assert torch.load(output / "model_final.pth")["iteration"] == MAX_ITER - 1


@pytest.mark.parametrize("options, state, message", [
    (["SOLVER.MAX_ITER", "4"], {"iteration": 7}, "is of 8 iterations, and the run ends after 4"),
    ([], {"num_workers": 3}, "trained by 3 workers, it cannot go on with 1"),
])  # fmt: skip
def test_the_command_line_refuses_to_resume_in_one_line(options, state, message, tmp_path):
    make_synthetic_coco(tmp_path, layout="shapes", train=4, val=2, size=64)
    output = tmp_path / "output"
    output.mkdir()
    torch.save({"model": {}, "trainer": state}, output / "model_0000007.pth")
    (output / "last_checkpoint").write_text("model_0000007.pth")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(INSTANT), "--resume",
         "OUTPUT_DIR", str(output), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [l for l in done.stdout.splitlines() if "arn" not in l and "pkg_resources" not in l]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0]
    assert sorted(os.listdir(output)) == ["last_checkpoint", "model_0000007.pth"]
