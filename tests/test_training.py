"""Training and evaluation from the command line, with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer

from .helpers import CONFIGS, INSTANT, ROOT
from .helpers.runs import assert_same_run, cfg_for, environment, train_a_worker, weights
from .helpers.workers import run_workers


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, layout="shapes", train=20, val=4, size=64)
    return folder


def command(output, *options, config=INSTANT):
    options = [str(option) for option in options]
    return [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config),
            *[o for o in options if o.startswith("--")], "OUTPUT_DIR", str(output),
            *[o for o in options if not o.startswith("--")]]  # fmt: skip


def train(datasets, output, *options, config=INSTANT, check=True):
    done = subprocess.run(
        command(output, *options, config=config), env=environment(datasets),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-3000:]
    return done


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    """Output folder and printed text of a run with one worker that nobody stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    return output, train(shapes, output).stdout


def test_training_writes_what_detectron2_users_expect(uninterrupted):
    output, printed = uninterrupted
    names = {path.name for path in output.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_final.pth",
            "model_0000003.pth"} <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert "32 norms, 32 centralized convolutions" in printed
    assert "Evaluation results for bbox" in printed and "Evaluation results for segm" in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(shapes, uninterrupted, tmp_path, how):
    process = subprocess.Popen(
        command(tmp_path, "DATALOADER.NUM_WORKERS", 1), env=environment(shapes),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 200
    while not (tmp_path / "model_0000003.pth").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    process.wait()
    assert not (tmp_path / "model_final.pth").exists()
    train(shapes, tmp_path, "--resume")
    assert_same_run(uninterrupted[0], tmp_path)


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_moment_arrives_at_the_same_model(
    shapes, uninterrupted, tmp_path
):
    for delay in (1.0, 5.2, 6.1, 7.3):
        process = subprocess.Popen(
            command(tmp_path, "--resume", "SOLVER.CHECKPOINT_PERIOD", 1),
            env=environment(shapes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay)
        process.kill()
        process.wait()
    train(shapes, tmp_path, "--resume")
    assert_same_run(uninterrupted[0], tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_run_stopped_before_the_final_checkpoint_writes_it_when_it_is_resumed(shapes, tmp_path):
    cfg = cfg_for(shapes, tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    final = torch.load(tmp_path / "model_final.pth")
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    again = torch.load(tmp_path / "model_final.pth")
    assert again["iteration"] == final["iteration"] == 1
    assert again["trainer"]["iteration"] == final["trainer"]["iteration"] == 1
    assert all(torch.equal(value, again["model"][key]) for key, value in final["model"].items())
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_checkpoint_that_is_being_written_when_the_job_dies_does_not_replace_the_last_one(
    shapes, tmp_path, monkeypatch
):
    trainer = Trainer(cfg_for(shapes, tmp_path))
    trainer.iter = 0
    trainer.checkpointer.save("model_0000003")
    good = (tmp_path / "model_0000003.pth").read_bytes()

    def die(data, f):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    for name in ("model_0000003", "model_0000007"):
        with pytest.raises(KeyboardInterrupt):
            trainer.checkpointer.save(name)
    left = sorted(name for name in os.listdir(tmp_path) if "model" in name or name[0] == ".")
    assert left == ["model_0000003.pth"]
    assert (tmp_path / "model_0000003.pth").read_bytes() == good
    assert trainer.checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000003.pth")


def test_a_run_without_a_fixed_seed_resumes_with_the_seed_it_drew(shapes, tmp_path):
    cfg = cfg_for(shapes, tmp_path, "SEED", "-1")
    first, second = Trainer(cfg), Trainer(cfg)
    assert first.seed != second.seed
    first.iter = 3
    first.checkpointer.save("model_0000003")
    second.resume_or_load(resume=True)
    assert (second.seed, second.start_iter) == (first.seed, 4)
    assert (second.train_loader.seed, second.train_loader.start_iter) == (first.seed, 4)
    first.resume_or_load(resume=True)
    for a, b in zip(next(iter(first.train_loader)), next(iter(second.train_loader))):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])


def test_evaluation_alone_prints_the_table_of_the_checkpoint(uninterrupted, shapes, tmp_path):
    output, printed = uninterrupted
    done = train(shapes, tmp_path, "--eval-only", "MODEL.WEIGHTS", output / "model_final.pth")
    table = [
        line.split("copypaste: ")[1] for line in done.stdout.splitlines() if "copypaste" in line
    ]
    assert table == [l.split("copypaste: ")[1] for l in printed.splitlines() if "copypaste" in l]
    assert len(table) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["MODEL.MABN.BUFFER_SIZE", 2.5],
            "MODEL.MABN.BUFFER_SIZE must be a positive integer, or 0 for 32 / images per worker, got 2.5",
        ),
        (
            ["MODEL.MABN.WARMUP_ITERS", -2],
            "MODEL.MABN.WARMUP_ITERS must be a non-negative integer, or -1 for the first of SOLVER.STEPS, got -2",
        ),
        (["MODEL.MABN.MOMENTUM", 2.0], r"MODEL.MABN.MOMENTUM must be a number in (0, 1], got 2.0"),
        (["MODEL.MABN.EPS", "small"], "MODEL.MABN.EPS"),
        (["MODEL.FPN.NORM", "MABM"], "MODEL.FPN.NORM must be one of MABN, BRN, MBN, BN, SyncBN"),
        (["MODEL.MABN.NO_SUCH_KEY", 1], "MODEL.MABN.NO_SUCH_KEY"),
        (["DATASETS.TRAIN", "('no_such_set',)"], "DATASETS.TRAIN: no data set is registered"),
        (["DATASETS.TEST", "('coco_2017_val',)"], "annotations/instances_val2017.json"),
        (["MODEL.WEIGHTS", "missing.pth"], "MODEL.WEIGHTS: missing.pth does not exist"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line_before_anything_starts(
    shapes, tmp_path, options, message
):
    done = train(shapes, tmp_path / "output", *options, check=False)
    assert done.returncode == 2
    lines = [l for l in done.stdout.splitlines() if "arn" not in l and "pkg_resources" not in l]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "output").exists()


def test_a_batch_that_cannot_be_divided_among_the_workers_is_refused(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH .* workers \(1\), got 0"):
        Trainer(cfg_for(shapes, tmp_path, "SOLVER.IMS_PER_BATCH", "0"))


@pytest.mark.parametrize("images, size, warned", [(2, 16, False), (2, 2, True), (8, 16, True)])
def test_moving_averages_over_another_number_of_images_than_the_papers_are_mentioned(
    shapes, tmp_path, caplog, images, size, warned
):
    options = ["SOLVER.IMS_PER_BATCH", str(images), "MODEL.MABN.BUFFER_SIZE", str(size)]
    Trainer(cfg_for(shapes, tmp_path, *options))
    assert ("MODEL.MABN.BUFFER_SIZE" in caplog.text) == warned


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_after_synchronization_all_workers_hold_the_mean_to_the_bit(shapes, tmp_path, workers):
    results = run_workers(workers, train_a_worker, tmp_path, shapes, tmp_path / "out", 3)
    before, after, models = zip(*results)
    saved = weights(tmp_path / "out")
    for rank in range(workers):
        for a, b in zip(after[0], after[rank]):
            assert torch.equal(a, b)
        for key, value in models[rank].items():
            assert torch.equal(value, saved[key])
    differ = 0
    for *by_worker, mean in zip(*before, after[0]):
        if mean.is_floating_point():
            expected = torch.stack(by_worker).double().mean(0).to(mean.dtype)
            torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)
            differ += not torch.equal(by_worker[0], by_worker[1])
        else:
            assert mean == torch.stack(by_worker).min()
    assert differ > 50  # each worker had statistics of its own


@pytest.mark.slow
def test_the_papers_config_trains_with_two_workers_and_evaluates_on_the_coco_layout(tmp_path):
    make_synthetic_coco(tmp_path, layout="coco2017", train=8, val=2, size=64)
    config = CONFIGS / "COCO-InstanceSegmentation" / "scratch_mask_rcnn_R_50_FPN_2x_mabn.yaml"
    small = ["SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64,
             "MODEL.RPN.POST_NMS_TOPK_TRAIN", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 8,
             "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
             # Four iterations from the running statistics' start are too few to evaluate with.
             "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2,
             "DATALOADER.NUM_WORKERS", 0]  # fmt: skip
    output = tmp_path / "output"
    done = train(tmp_path, output, "--num-gpus=2", "--dist-url=auto", "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 4,
                 *small, config=config)  # fmt: skip
    assert "69 norms, 69 centralized convolutions" in done.stdout
    assert "Evaluation results for segm" in done.stdout
    done = train(tmp_path, output, "--eval-only", "MODEL.WEIGHTS", output / "model_final.pth",
                 *small, config=config)  # fmt: skip
    assert "Evaluation results for segm" in done.stdout
