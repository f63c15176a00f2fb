"""What users of version 0.1.0 have: checkpoints load, resume and convert, and imports work."""

import importlib
import shutil

import numpy as np
import pytest
import torch

from .helpers import ROOT, load_tool, version_0_1_0
from .helpers.version_0_1_0 import CHECKPOINT, FOLDER, MAX_ITER, NORMS, RUNS, as_vector


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    version_0_1_0.register_images(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recorded():
    with np.load(FOLDER / "recorded.npz") as file:
        return dict(file)


def saved_model(run):
    return torch.load(FOLDER / run / CHECKPOINT, weights_only=True)["model"]


def resume(run, output):
    shutil.copytree(FOLDER / run, output)
    return version_0_1_0.train(run, output)


def convert(monkeypatch, source, destination):
    """Runs the command line in this process."""
    arguments = ["convert_weights.py", str(source), str(destination), "--from", "detectron2"]
    monkeypatch.setattr("sys.argv", arguments)
    assert load_tool("convert_weights").main() == 0


def test_there_is_a_checkpoint_of_every_norm_and_all_files_are_small():
    assert {path.parent.name for path in FOLDER.glob(f"*/{CHECKPOINT}")} == set(RUNS) >= set(NORMS)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 100 * 1024


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_loads_as_weights_and_evaluates_to_the_recorded_outputs(
    run, tmp_path, recorded, caplog
):
    outputs = version_0_1_0.outputs(run, tmp_path, str(FOLDER / run / CHECKPOINT))
    assert not [r for r in caplog.records if r.levelname != "INFO" and "checkpoint" in r.name]
    np.testing.assert_allclose(outputs.numpy(), recorded[f"{run}_outputs"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_equals_the_recorded_one_and_the_next_to_the_bit(run, tmp_path, recorded):
    first, second = (resume(run, tmp_path / name) for name in ("first", "second"))
    assert len(first.losses) == MAX_ITER - version_0_1_0.CHECKPOINT_ITERS
    np.testing.assert_allclose(first.losses, recorded[f"{run}_losses"], rtol=1e-6, atol=1e-6)
    final = as_vector(first.final, saved_model(run))
    np.testing.assert_allclose(final, recorded[f"{run}_final"], rtol=1e-6, atol=1e-6)
    assert first.losses == second.losses
    for name, tensor in first.final.items():
        assert torch.equal(tensor, second.final[name]), name


@pytest.mark.parametrize("run", ["MABN", "classifier"])
def test_a_resumed_run_draws_from_the_seed_of_the_checkpoint(run, tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(version_0_1_0, "SEED", -1)  # a random one
    losses = resume(run, tmp_path / "output").losses
    np.testing.assert_allclose(losses, recorded[f"{run}_losses"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_not_resumed_ends_at_the_same_recorded_state(run, tmp_path, recorded):
    final = version_0_1_0.train(run, tmp_path / "whole").final
    final = as_vector(final, saved_model(run))
    np.testing.assert_allclose(final, recorded[f"{run}_final"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_convert_weights_keeps_every_tensor_of_a_checkpoint(run, tmp_path, monkeypatch, recorded):
    destination = tmp_path / "weights.pth"
    convert(monkeypatch, FOLDER / run / CHECKPOINT, destination)
    converted = torch.load(destination, weights_only=True)["model"]
    saved = saved_model(run)
    assert set(saved) <= set(converted)
    for name, tensor in saved.items():
        assert torch.equal(converted[name], tensor), name
    outputs = version_0_1_0.outputs(run, tmp_path, str(destination))
    np.testing.assert_allclose(outputs.numpy(), recorded[f"{run}_outputs"], rtol=1e-6, atol=1e-6)


def works(public_name):
    module, _, name = public_name.partition(":")
    if module.endswith(".py"):
        return (ROOT / module).is_file()
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return not name or hasattr(imported, name)


def test_every_public_name_of_version_0_1_0_works_or_is_in_the_changelog():
    names = [
        line for line in (FOLDER / "public_names.txt").read_text().splitlines() if line[0] != "#"
    ]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    gone = [name.replace(":", ".").rstrip(".") for name in names if not works(name)]
    assert [name for name in gone if name not in changelog] == []
