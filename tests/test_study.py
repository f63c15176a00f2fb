"""Studies: the plan, what the runner makes of it, and what the results become."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from torch import nn

from mabn_d2.checkpoint import Checkpointer
from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import load_lazy_config, preflight
from mabn_d2.layers import BRN2d, MABN2d
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import add_arguments, bring_in
from mabn_d2.study import document, figures, job, measure, runner, tables, weights_as
from mabn_d2.study.plan import TOOLS, load_plan

from .helpers import CONFIGS, INSTANT, ROOT, load_tool
from .helpers.ablations import registered_ablations
from .helpers.fashion_mnist import write_fashion_mnist
from .helpers.runs import environment
from .helpers.settled import relative_error, settle

NORM_KEYS = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM"]


def plan_of(folder, **changes):
    """The content of a plan with a detector's and a classifier's blocks, with some keys replaced."""
    content = {
        "output": str(folder / "out"),
        "results": str(folder / "results.csv"),
        "document": str(folder / "docs" / "study.md"),
        "images": str(folder / "docs" / "images"),
        "tasks": {
            "shapes": {"tool": "train_net", "config": str(INSTANT), "norm": NORM_KEYS},
            "pictures": {
                "tool": "lazyconfig_train_net",
                "config": str(CONFIGS / "study" / "fashion_mnist.py"),
                "norm": "model.stages.norm.name",
            },
        },
        "norms": {
            "BN": None,
            "MABN": None,
            "BN(16)": {"norm": "BN", "one_process": True},
            "buffer 4": {"norm": "MABN", "options": {"MODEL.MABN.BUFFER_SIZE": 4}, "lr_of": "MABN"},
        },
        "levels": {"looks": {"options": {"DATASETS.TRAIN": ["shapes_train"]}}, "alike": None},
        "protocols": {
            "P1": {"images": 2},
            "P2": {"images": 16, "workers": 8, "slots": 2},
            "N4": {"images": 32, "norm_batch": 4},
        },
        "blocks": {
            "lr": {
                "task": "shapes", "norms": ["BN", "MABN"], "levels": "looks", "protocols": "P1",
                "lr": [0.01, 0.02], "seeds": 1,
            },
            "main": {
                "title": "All norms", "task": "shapes", "norms": ["BN", "MABN", "buffer 4"],
                "levels": "looks", "protocols": "P1", "lr": "best of lr", "seeds": [1, 2],
                "differences": [["MABN", "BN"]],
            },
        },
    }  # fmt: skip
    content.update(changes)
    return content


@pytest.fixture
def write_plan(tmp_path):
    """A plan, beside which there is something under the name of its data."""
    annotations = tmp_path / "shapes" / "annotations" / "instances_train.json"
    annotations.parent.mkdir(parents=True)
    annotations.touch()

    def write_plan(**changes):
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(plan_of(tmp_path, **changes), sort_keys=False))
        return load_plan(file)

    return write_plan


def block(**changes):
    return {
        "task": "shapes", "norms": ["BN"], "protocols": ["P1"], "lr": 0.01, "seeds": [1], **changes
    }  # fmt: skip


# ---- the plan ------------------------------------------------------------------------------------


def test_runs_are_the_grid_of_each_block_in_the_order_of_the_plan(write_plan):
    assert [run.id for run in write_plan().runs] == [
        "lr/looks-P1-BN-lr0.01-s1",
        "lr/looks-P1-MABN-lr0.01-s1",
        "lr/looks-P1-BN-lr0.02-s1",
        "lr/looks-P1-MABN-lr0.02-s1",
        "main/looks-P1-BN-s1",
        "main/looks-P1-MABN-s1",
        "main/looks-P1-buffer_4-s1",
        "main/looks-P1-BN-s2",
        "main/looks-P1-MABN-s2",
        "main/looks-P1-buffer_4-s2",
    ]


def test_the_command_of_a_detector_has_all_that_the_plan_says(write_plan):
    run = write_plan().block("main").runs[2]
    assert run.arguments(0.02) == [
        "--config-file", str(INSTANT), "MODEL.RESNETS.NORM", "MABN", "MODEL.FPN.NORM", "MABN",
        "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TRAIN", '["shapes_train"]', "MODEL.MABN.BUFFER_SIZE", "4",
        "SOLVER.BASE_LR", "0.02", "SEED", "1",
    ]  # fmt: skip


def test_the_command_of_a_classifier_has_overrides_and_the_norm_batch(write_plan):
    blocks = {"fm": block(task="pictures", norms=["MABN"], protocols=["N4"])}
    (run,) = write_plan(blocks=blocks).runs
    assert run.arguments(run.lr)[2:] == [
        "model.stages.norm.name=MABN", "dataloader.train.total_batch_size=32", "model.norm_batch_size=4",
        "optimizer.lr=0.01", "train.seed=1",
    ]  # fmt: skip
    assert run.norm_batch == 4 and run.level == ""


def test_virtual_workers_are_an_option_of_the_training(write_plan):
    protocols = {"P2": {"images": 16, "virtual_workers": 8}}
    few, all_ = write_plan(
        blocks={"p2": block(norms=["BN", "BN(16)"], protocols="P2")}, protocols=protocols
    ).runs
    assert (few.workers, few.virtual_workers, few.norm_batch, few.slots) == (1, 8, 2, 1)
    assert "SOLVER.VIRTUAL_WORKERS 8" in few.command(0.01) and "--num-gpus" not in few.command(0.01)
    assert (all_.virtual_workers, all_.norm_batch) == (1, 16)
    assert "VIRTUAL" not in all_.command(0.01)


def test_a_norm_over_all_images_runs_in_one_process_where_others_have_workers(write_plan):
    few, all_ = write_plan(blocks={"p2": block(norms=["BN", "BN(16)"], protocols="P2")}).runs
    assert (few.workers, few.norm_batch, few.slots) == (8, 2, 2)
    assert (all_.workers, all_.norm_batch, all_.slots) == (1, 16, 1)
    assert few.arguments(None)[:2] == ["--num-gpus", "8"] and "--num-gpus" not in all_.arguments(
        None
    )


def test_options_of_a_block_replace_those_of_a_norm_and_those_of_a_level_and_those_of_a_task(
    write_plan,
):
    content = plan_of(Path())
    layers = ["tasks", "protocols", "levels", "norms", "blocks"]
    entries = ["shapes", "P1", "alike", "BN", "one"]
    content["blocks"] = {"one": block(levels="alike")}
    for number, (layer, entry) in enumerate(zip(layers, entries)):
        node = dict(content[layer][entry] or {})
        node["options"] = {f"KEY{i}": number for i in range(number, len(layers))}
        content[layer][entry] = node
    (run,) = write_plan(**{layer: content[layer] for layer in layers}).runs
    # KEYi is stated by the first i + 1 layers.
    assert {f"KEY{i}": run.options[f"KEY{i}"] for i in range(5)} == {f"KEY{i}": i for i in range(5)}


def test_a_run_starts_from_the_run_of_its_own_seed(write_plan):
    weights = {"run": "main/looks-P1-BN-s{seed}", "import": "as_is"}
    blocks = {**plan_of(Path())["blocks"], "tune": block(seeds=[1, 2], weights=weights)}
    runs = write_plan(blocks=blocks).block("tune").runs
    assert [run.weights for run in runs] == ["main/looks-P1-BN-s1", "main/looks-P1-BN-s2"]
    assert runs[0].options["MODEL.WEIGHTS_IMPORT"] == "as_is"


def test_a_norm_can_start_from_scratch_where_others_have_weights(write_plan):
    norms = {"BN": None, "new": {"norm": "BN", "scratch": True}}
    tune = block(norms=["BN", "new"], weights={"run": "main/P1-BN-lr0.01-s1", "import": "as_is"})
    start, new = write_plan(norms=norms, blocks={"main": block(), "tune": tune}).block("tune").runs
    assert start.weights == "main/P1-BN-lr0.01-s1" and new.weights == ""
    assert "MODEL.WEIGHTS_IMPORT" not in new.options


LR = plan_of(Path())["blocks"]["lr"]
NEAR = {"run": "lr/looks-P1-BN-lr0.01-s{seed}"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks": []}, "blocks must be a group of keys"),
        ({"block": {}}, "the plan: no 'block' (similar is blocks)"),
        ({"blocks": {"a": {"task": "shapes"}}}, "blocks.a lacks norms"),
        ({"blocks": {"a": block(norms=["MABM"])}}, "blocks.a.norms: no 'MABM' (similar is MABN)"),
        ({"blocks": {"a": block(task="shape")}}, "blocks.a.task: no 'shape' (similar is shapes)"),
        ({"blocks": {"a": block(protocols="P3")}}, "blocks.a.protocols: no 'P3'"),
        ({"blocks": {"a": block(levels="look")}}, "blocks.a.levels: no 'look' (similar is looks)"),
        ({"blocks": {"a": block(seed=1)}}, "blocks.a: no 'seed' (similar is seeds)"),
        ({"blocks": {"a": block(seeds="one")}}, "blocks.a.seeds must be of int, got 'one'"),
        ({"blocks": {"a": block(lr="high")}}, "blocks.a.lr must be of float, got 'high'"),
        ({"blocks": {"a": block(lr="best of lr")}}, "blocks.a.lr: no 'lr'; there are"),
        ({"blocks": {"a/b": block()}}, "blocks.a/b: a block's name has letters"),
        ({"blocks": {"a": block(differences=["BN"])}}, "blocks.a.differences: 'BN' is not a pair"),
        ({"blocks": {"a": block(differences=[["MABN", "BN"]])}}, "blocks.a.differences: no 'MABN'"),
        ({"blocks": {"lr": LR, "a": block(lr="best of lr", protocols="P2")}}, "no runs of BN with protocol P2"),
        ({"blocks": {"lr": LR, "a": block(seeds=[2], weights=NEAR)}}, "no block before has the run lr/looks-P1-BN-lr0.01-s2 (similar"),
        ({"tasks": {"shapes": {"tool": "train", "config": "a", "norm": "b"}}}, "tasks.shapes.tool: no 'train'"),
        ({"protocols": {"P1": {"images": "two"}}}, "protocols.P1.images must be an integer of at least 1, got 'two'"),
        ({"protocols": {"P1": {"images": 2, "virtual_workers": True}}}, "protocols.P1.virtual_workers must be an integer of at least 1, got True"),
        ({"protocols": {"P1": {"images": 2, "workers": 0}}}, "protocols.P1.workers must be an integer of at least 1, got 0"),
        ({"norms": {"BN": {"weights_as": "folded"}}, "blocks": {"a": block()}}, "norms.BN.weights_as: no 'folded'"),
        ({"blocks": {"a": block(weights={"import": "exact"})}}, "blocks.a.weights must have either run or file, got import"),
        ({"blocks": {"a": block(weights={"run": "b", "file": "c"})}}, "blocks.a.weights must have either run or file, got run, file"),
        ({"blocks": {"a": block(seeds=[1, 1])}}, "blocks.a: several runs would have the id a/P1-BN-lr0.01-s1"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_plan_is_named(write_plan, changes, message):
    with pytest.raises(ValueError, match="study.yaml: ") as error:
        write_plan(**changes)
    assert message in str(error.value)


def test_a_plan_that_is_no_yaml_or_not_there_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="broken.yaml is not YAML"):
        load_plan(tmp_path / "broken.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml' does not exist"):
        load_plan(tmp_path / "none.yaml")


PLANS = sorted((CONFIGS / "study").glob("*.yaml"))


@pytest.fixture
def with_ablations():
    with registered_ablations():
        yield


@pytest.mark.parametrize("file", PLANS, ids=[file.stem for file in PLANS])
def test_a_plan_of_the_repository_has_configs_and_runs_that_differ(file):
    runs = load_plan(file).runs
    assert len({run.id for run in runs}) == len(runs) > 10
    assert {run.config for run in runs if not (ROOT / run.config).is_file()} == set()
    distinct = {(run.id.partition("/")[0], run.command(run.lr), run.start) for run in runs}
    assert len(distinct) == len(runs)  # no two names for one thing


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All data sets of the repository's plans, a few images of each."""
    folder = tmp_path_factory.mktemp("data")
    for variety in ("looks", "content", "alike"):
        make_synthetic_coco(folder, layout="shapes", train=6, val=2, size=64, variety=variety)
    write_fashion_mnist(folder, train=40, val=10)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", PLANS, ids=[file.stem for file in PLANS])
def test_every_run_of_a_plan_of_the_repository_is_accepted(
    file, data, tmp_path, monkeypatch, with_ablations
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    plan = load_plan(file)
    of_a_kind = {(r.block, r.level, r.protocol, r.norm): r for r in plan.runs}  # seed and LR aside
    for run in of_a_kind.values():
        output = run.tool.options({run.tool.output: str(tmp_path / "out")})
        arguments = [*run.arguments(run.lr or 0.01), *output]
        args = add_arguments(default_argument_parser()).parse_args(arguments)
        bring_in(args)
        if run.tool is TOOLS["train_net"]:
            assert preflight.check(load_config(args.config_file, args.opts), args) == [], run.id
        else:
            cfg = load_lazy_config(args.config_file, args.opts)
            assert preflight.check_lazy(cfg, args) == [], run.id


def test_the_classifiers_backbone_is_the_detectors(tmp_path):
    """Of the plan of fine-tuning: by names and shapes, and with the function that it had."""
    plan = load_plan(CONFIGS / "study" / "finetune.yaml")
    torch.manual_seed(0)
    config = str(ROOT / plan.block("classifier").runs[0].config)
    source = instantiate(load_lazy_config(config, []).model)
    Checkpointer(settle(source), str(tmp_path)).save("model_final")
    (run,) = (run for run in plan.block("far").runs if run.id == "far/content-P1-MABN_exact-s1")
    options = run.tool.options({**run.options, "MODEL.DEVICE": "cpu"})
    model = build_model(load_config(str(ROOT / run.config), options))
    Checkpointer(model).load(str(tmp_path / "model_final.pth"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, x = source.stem(images), model.eval().backbone.bottom_up.stem(images)
        for stage in source.stage_names:
            expected = getattr(source, stage)(expected)
            x = getattr(model.backbone.bottom_up, stage)(x)
            assert relative_error(x, expected) < 1e-4


@pytest.mark.parametrize("size, groups", [(2, 16), (0, 1)])
def test_the_classifiers_norm_counts_iterations_whatever_the_norm_batch(size, groups):
    file = str(CONFIGS / "study" / "fashion_mnist.py")

    def norm(name):
        overrides = [f"model.stages.norm.name={name}", f"model.norm_batch_size={size}"]
        return instantiate(load_lazy_config(file, overrides).model).stem.conv1.norm

    mabn, brn = norm("MABN"), norm("BRN")
    assert isinstance(mabn, MABN2d) and isinstance(brn, BRN2d) and mabn.norm_batch_size == size
    assert (mabn.psi.size, mabn.warmup_iters, mabn.renorm_start_iter) == (
        groups,
        groups,
        100 * groups,
    )
    np.testing.assert_allclose((1 - mabn.momentum) ** groups, 0.98)
    assert brn.r_max_iters == (16 * groups, 125 * groups)


# ---- the best learning rate ----------------------------------------------------------------------


def row(run, value=None, error="", lr=None, **more):
    metric = run.tool.metrics[0]
    text = "" if value is None else f"{value:g}"
    defaults = dict.fromkeys([*runner.COLUMNS, "date", "device", "torch"], "")
    lr = run.lr if lr is None else lr
    return {
        **defaults, "run": run.id, metric: text, "error": error, "seconds": "60",
        "command": run.command(lr), "lr": "" if lr is None else f"{lr:g}", **more,
    }  # fmt: skip


def test_the_best_learning_rate_is_that_of_the_same_norms_best_mean(write_plan):
    blocks = plan_of(Path())["blocks"]
    blocks["lr"] = {**blocks["lr"], "seeds": [1, 2]}
    plan = write_plan(blocks=blocks)
    low1, high1, low2, high2 = (run for run in plan.block("lr").runs if run.norm == "MABN")
    results = {}
    for run, value in [(low1, 30.0), (high1, 19.0), (low2, 10.0)]:
        results[run.id] = row(run, value)
        assert runner.chosen_lr(plan, plan.block("main").runs[1], results) is None
    results[high2.id] = row(high2, 22.0)  # means 20 and 20.5
    for run in plan.block("main").runs[1:3]:  # buffer 4 takes MABN's
        assert runner.chosen_lr(plan, run, results) == 0.02
    results[high2.id] = row(high2, 21.0)
    assert (
        runner.chosen_lr(plan, plan.block("main").runs[1], results) == 0.01
    )  # of equals the lower
    results[low1.id] = row(low1, error="Loss became infinite")
    assert runner.chosen_lr(plan, plan.block("main").runs[1], results) == 0.02
    results[high1.id] = row(high1, error="Loss became infinite")
    with pytest.raises(ValueError, match="no run of block lr has succeeded with MABN"):
        runner.chosen_lr(plan, plan.block("main").runs[1], results)


def test_the_best_learning_rate_of_a_classifier_has_the_lowest_error(write_plan):
    fm = block(task="pictures", protocols="N4")
    plan = write_plan(blocks={"lr": {**fm, "lr": [0.1, 0.2]}, "main": {**fm, "lr": "best of lr"}})
    low, high, run = plan.runs
    assert runner.chosen_lr(plan, run, {low.id: row(low, 9.0), high.id: row(high, 8.0)}) == 0.2


# ---- the runner ----------------------------------------------------------------------------------


class Pretended:
    """A launcher whose runs end when they are told to, or at once."""

    def __init__(self, at_once=True, errors=None, seconds=7.0):
        self.at_once, self.errors, self.seconds = at_once, errors or {}, seconds
        self.started, self.signals, self.stopped = [], [], []

    def start(self, folder):
        self.started.append(folder)
        return folder

    def is_done(self, folder):
        if not self.at_once:
            return False
        name = "/".join(folder.parts[-2:])
        error = next((text for part, text in self.errors.items() if part in name), "")
        done = {
            "error": error,
            "seconds": self.seconds,
            "device": "a machine",
            "torch": "2",
            "date": "2026-01-01",
        }
        (folder / "done.json").write_text(json.dumps(done))
        (folder / "model_0000003.pth").touch()
        (folder / "model_final.pth").touch()
        return True

    def signal(self, folder, number):
        self.signals.append((folder.name, number))

    def stop(self, folder):
        self.stopped.append(folder.name)

    @property
    def names(self):
        return ["/".join(folder.parts[-2:]) for folder in self.started]


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs a plan with a pretended launcher. The AP of a run is 10 times its learning rate's thousands."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(runner, "POLL", 0)
    monkeypatch.setattr(runner, "current_commit", lambda plan, dirty: "c0ffee")
    monkeypatch.setattr(runner, "checkout", lambda plan, commit: tmp_path / commit)

    def pretend_measure(run, folder):
        command = json.loads((folder / "origin.json").read_text())["command"].split()
        lr = float(command[command.index("SOLVER.BASE_LR") + 1])
        return {"box_ap": 1000 * lr, "mask_ap": 1.0}, [{"iteration": 4, "box_ap": 1000 * lr}]

    monkeypatch.setattr(runner, "measure", pretend_measure)

    def start(plan, launcher, jobs=2, **options):
        study = runner.Runner(plan, launcher, jobs, **options)
        study.run()
        return study

    return start


def test_each_run_leaves_a_row_with_all_that_it_was_and_a_curve(write_plan, start, tmp_path):
    plan = write_plan()
    study = start(plan, Pretended())
    rows = {r["run"]: r for r in runner.open_results(plan)[0].rows}
    assert set(rows) == {run.id for run in plan.runs}
    found = rows["main/looks-P1-buffer_4-s2"]
    expected = {
        "block": "main", "task": "shapes", "level": "looks", "protocol": "P1", "norm": "buffer 4",
        "norm_batch": "2", "workers": "1", "lr": "0.02", "lr_from": "lr", "seed": "2", "box_ap": "20",
        "mask_ap": "1", "seconds": "7", "commit": "c0ffee", "copy_of": "", "error": "",
        "device": "a machine", "torch": "2", "date": "2026-01-01",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["command"] == plan.runs[-1].command(0.02)
    assert {"run": found["run"], "iteration": "4", "box_ap": "20", "mask_ap": "", "top1_error": "", "loss": ""} in study.curves.rows  # fmt: skip
    files = {path.name for path in runner.folder_of(plan, plan.runs[-1]).iterdir()}
    assert "model_final.pth" in files and "model_0000003.pth" not in files


def test_a_run_whose_command_another_one_had_is_not_repeated(write_plan, start):
    launcher = Pretended()
    study = start(write_plan(), launcher)
    # LR 0.02 is the best, and seed 1 has been run with it.
    assert launcher.names == [
        *(run.id for run in study.plan.block("lr").runs),
        "main/looks-P1-buffer_4-s1", "main/looks-P1-BN-s2", "main/looks-P1-MABN-s2", "main/looks-P1-buffer_4-s2",
    ]  # fmt: skip
    assert study.rows["main/looks-P1-BN-s1"]["copy_of"] == "lr/looks-P1-BN-lr0.02-s1"
    assert study.rows["main/looks-P1-BN-s1"]["box_ap"] == "20"


def test_finished_runs_are_not_repeated_and_blocks_can_be_chosen(write_plan, start):
    plan = write_plan()
    launcher = Pretended()
    start(plan, launcher, blocks=["main"])
    assert launcher.names == []  # nothing has decided the learning rate
    start(plan, launcher, blocks=["lr"])
    assert len(launcher.names) == 4
    again = Pretended()
    start(plan, again)
    assert len(again.names) == 4 and not set(again.names) & set(launcher.names)
    nothing = Pretended()
    start(plan, nothing)
    assert nothing.names == []


def test_a_row_of_uncommitted_code_is_not_copied(write_plan, start):
    plan = write_plan()
    study = start(plan, Pretended(), blocks=["lr"])
    for row in list(study.results.rows):
        study.results.replace({"run": row["run"]}, [{**row, "commit": "c0ffee+dirty"}])
    launcher = Pretended()
    study = start(plan, launcher)
    assert len(launcher.names) == len(plan.block("main").runs)
    assert not any(row["copy_of"] for row in study.rows.values())


def test_a_failed_run_is_recorded_with_its_reason_and_repeated_only_if_asked(write_plan, start):
    plan = write_plan()
    nan = "FloatingPointError: Loss became infinite or NaN at iteration=5!"
    study = start(plan, Pretended(errors={"-P1-BN-lr0.02": nan}))
    failed = "lr/looks-P1-BN-lr0.02-s1"
    assert study.rows[failed]["error"] == nan and study.rows["main/looks-P1-BN-s1"]["lr"] == "0.01"
    assert f"- `{failed}`: {nan}" in tables.failures(plan.block("lr"), study.rows)
    launcher = Pretended()
    start(plan, launcher)
    assert launcher.names == []
    study = runner.Runner(plan, launcher, 1)
    study.retry_failed()
    study.run()
    assert launcher.names == [failed] and study.rows[failed]["error"] == ""


def test_a_run_whose_results_cannot_be_read_has_failed_and_the_others_go_on(
    write_plan, start, monkeypatch
):
    def unreadable(run, folder):
        if run.lr == 0.01:
            raise KeyError("bbox")
        return {"box_ap": 1.0}, []

    monkeypatch.setattr(runner, "measure", unreadable)
    study = start(write_plan(), Pretended(), blocks=["lr"])
    errors = {r["error"] for r in study.results.rows}
    assert errors == {"its results cannot be read: KeyError: bbox", ""} and len(study.rows) == 4


def test_runs_that_depend_on_failed_ones_fail_with_the_reason(write_plan, start):
    weights = {"run": "lr/looks-P1-BN-lr0.01-s1"}
    plan = write_plan(blocks={**plan_of(Path())["blocks"], "tune": block(weights=weights)})
    study = start(plan, Pretended(errors={"lr/looks-P1-BN": "out of memory"}))
    errors = {name: r["error"] for name, r in study.rows.items() if r["error"] != "out of memory"}
    assert errors.pop("main/looks-P1-BN-s1") == "no run of block lr has succeeded with BN"
    assert errors.pop("tune/P1-BN-lr0.01-s1").startswith("the run lr/looks-P1-BN-lr0.01-s1 that it")
    assert len(study.rows) == len(plan.runs) and errors.pop("main/looks-P1-MABN-s1") == ""


def test_a_run_that_starts_from_a_copy_takes_the_weights_of_the_original(write_plan, start):
    weights = {"run": "main/looks-P1-BN-s1", "import": "exact"}
    plan = write_plan(
        blocks={**plan_of(Path())["blocks"], "tune": block(norms="MABN", weights=weights)}
    )
    launcher = Pretended()
    start(plan, launcher)
    first, train = json.loads((launcher.started[-1] / "job.json").read_text())["commands"]
    source = str(runner.folder_of(plan, plan.block("lr").runs[2]) / "model_final.pth")
    for command in (first, train):
        arguments = command["arguments"]
        assert arguments[arguments.index("MODEL.WEIGHTS") + 1] == source
    assert "mabn_d2.study.at_start" in first["arguments"]
    assert first["creates"] == str(launcher.started[-1] / "at_start.json") and not train["creates"]


def test_a_run_is_trained_again_if_others_start_from_it_and_its_weights_are_gone(write_plan, start):
    lost = ["lr/looks-P1-BN-lr0.01-s1", "tune/P1-BN-lr0.01-s1"]
    tune = block(weights={"run": lost[0]})
    again = block(norms="MABN", weights={"run": lost[1]})
    plan = write_plan(blocks={**plan_of(Path())["blocks"], "tune": tune, "again": again})
    study = start(plan, Pretended(), blocks=["lr", "tune"])
    shutil.rmtree(plan.output / "runs")  # as in a new clone, which has the rows alone
    nothing = Pretended()
    start(plan, nothing, blocks=["lr", "tune"])
    assert nothing.names == []  # nobody needs them

    launcher = Pretended(errors={lost[0]: "out of memory"})
    study = start(plan, launcher, blocks=["again"])
    assert launcher.names == lost[:1]  # its own source comes first
    assert study.rows[lost[0]]["error"] == "out of memory"
    assert "has failed" in study.rows[lost[1]]["error"]

    for name in lost:
        study.results.replace({"run": name}, [{**study.rows[name], "error": "", "seconds": "7"}])
    study.results.forget([{"run": run.id} for run in plan.block("again").runs])
    shutil.rmtree(plan.output / "runs")
    (plan.output / "runs" / lost[0]).mkdir(parents=True)
    (plan.output / "runs" / lost[0] / "done.json").write_text("{}")  # no reason not to train
    launcher = Pretended()
    study = start(plan, launcher, blocks=["again"])
    assert launcher.names == [*lost, plan.block("again").runs[0].id]
    assert study.rows[lost[0]]["date"] == "2026-01-01" and len(study.rows) == 6


def test_what_starts_from_a_run_that_is_trained_again_is_repeated(write_plan, start, capsys):
    source = "lr/looks-P1-BN-lr0.02-s1"
    tune = block(norms=["BN", "MABN"], lr=[0.01, 0.02], weights={"run": source})
    best = block(norms=["BN", "MABN"], lr="best of tune", weights={"run": source})
    plan = write_plan(blocks={**plan_of(Path())["blocks"], "tune": tune, "best": best})
    first = start(plan, Pretended(), blocks=["lr", "tune", "best"])
    missing = "tune/P1-MABN-lr0.02-s1"
    first.results.forget([{"run": missing}])
    (runner.folder_of(plan, plan.block("lr").runs[2]) / "model_final.pth").unlink()

    launcher = Pretended(seconds=8.0)
    study = start(plan, launcher, blocks=["tune", "best"])
    assert launcher.names == [source, *(run.id for run in plan.block("tune").runs)]
    # The folder of the missing one holds results that are of the former weights. The learning rates of
    # what is repeated, and its copies, are of the repeated runs.
    assert {row["copy_of"] for row in study.rows.values() if row["block"] == "best"} == {
        "tune/P1-BN-lr0.02-s1", missing
    }  # fmt: skip
    assert list(study.rows)[-7:-2] == launcher.names
    assert runner.superseded(study.rows) == set()
    expected = {run.id for name in ("tune", "best") for run in plan.block(name).runs}
    assert runner.superseded(study.rows, {source}) == {source, *expected}

    # Where the source is trained again in a study of its own, `status` tells what it leaves behind.
    study.results.replace({"run": source}, [study.rows[source]])
    assert runner.superseded(study.rows) == expected
    assert load_tool("study").main([str(plan.file), "status"]) == 0
    assert "6 results start from weights that have been trained again" in capsys.readouterr().out


def test_weights_can_be_rewritten_first(write_plan, start):
    norms = {
        **plan_of(Path())["norms"], "MABN, affine": {"norm": "MABN", "weights_as": "affine"}
    }  # fmt: skip
    tune = block(norms=["MABN", "MABN, affine"], weights={"run": "lr/looks-P1-BN-lr0.01-s1"})
    plan = write_plan(norms=norms, blocks={**plan_of(Path())["blocks"], "tune": tune})
    launcher = Pretended()
    study = start(plan, launcher, blocks=["lr", "tune"])
    first, *others = json.loads((launcher.started[-1] / "job.json").read_text())["commands"]
    source = str(runner.folder_of(plan, plan.runs[0]) / "model_final.pth")
    rewritten = str(launcher.started[-1] / "weights.pth")
    assert first["arguments"][1:] == ["-m", "mabn_d2.study.weights_as", "affine", source, rewritten]
    assert first["creates"] == rewritten and len(others) == 2  # evaluation, training
    for command in others:
        arguments = command["arguments"]
        assert arguments[arguments.index("MODEL.WEIGHTS") + 1] == rewritten
    of_both = [study.rows[run.id] for run in plan.block("tune").runs]  # neither is a copy
    assert [row["weights"] for row in of_both] == [plan.runs[0].id, f"{plan.runs[0].id}, affine"]
    assert [row["copy_of"] for row in of_both] == ["", ""]


def test_a_norm_can_start_from_other_weights_than_its_block(write_plan):
    own = {"norm": "MABN", "weights": {"run": "lr/looks-P1-MABN-lr0.01-s{seed}"}}
    tune = block(norms=["MABN", "own"], weights={"run": "lr/looks-P1-BN-lr0.01-s{seed}"})
    plan = write_plan(
        norms={**plan_of(Path())["norms"], "own": own},
        blocks={**plan_of(Path())["blocks"], "tune": tune},
    )
    starts = [run.start for run in plan.block("tune").runs]
    assert starts == ["lr/looks-P1-BN-lr0.01-s1", "lr/looks-P1-MABN-lr0.01-s1"]


@pytest.mark.parametrize("form", weights_as.FORMS)
def test_rewritten_weights_have_the_function_that_they_had(tmp_path, form):
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    torch.manual_seed(0)
    model = build()
    nn.init.uniform_(model[1].weight, -1, 2)
    nn.init.uniform_(model[1].bias)
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.1, 3)
    classifier = {"model": model.state_dict(), "matching_heuristics": True, "optimizer": {}}
    torch.save(classifier, tmp_path / "a.pth")
    weights_as.main(form, str(tmp_path / "a.pth"), str(tmp_path / "b.pth"))
    written = torch.load(tmp_path / "b.pth")
    assert written.keys() == {"model", "matching_heuristics"}  # a detector finds its backbone
    rewritten = written["model"]
    second_moment = model[1].running_var + model[1].running_mean ** 2
    var = torch.ones(4) if form == "affine" else second_moment
    torch.testing.assert_close(rewritten["1.running_var"], var, atol=1e-4, rtol=0)
    assert not rewritten["1.running_mean"].any()
    other = build()
    other.load_state_dict(rewritten, strict=False)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_a_run_counts_as_its_slots_and_no_later_one_goes_first(write_plan, start):
    blocks = {"a": block(norms=["BN", "MABN"], protocols=["P2", "P1"])}
    launcher = Pretended(at_once=False)
    study = runner.Runner(write_plan(blocks=blocks), launcher, 3)
    study.bar = runner.tqdm(disable=True)
    study._start_next()
    assert launcher.names == ["a/P2-BN-lr0.01-s1"]  # the next one needs two, those after it one
    launcher.at_once = True
    study._collect()
    launcher.at_once = False
    study._start_next()
    assert launcher.names[1:] == ["a/P2-MABN-lr0.01-s1", "a/P1-BN-lr0.01-s1"]
    launcher = Pretended()
    start(write_plan(blocks={"b": block(protocols="P2", seeds=2)}), launcher, jobs=1)
    assert launcher.names == ["b/P2-BN-lr0.01-s2"]  # even if there are never so many


def test_a_paused_study_stops_its_processes_and_starts_nothing(write_plan, start):
    plan = write_plan()
    launcher = Pretended(at_once=False)
    study = runner.Runner(plan, launcher, 1)
    study.bar = runner.tqdm(disable=True)
    plan.output.mkdir()
    tool = load_tool("study")
    file = str(plan.file)
    study._start_next()
    assert tool.main([file, "pause"]) == 0
    study._pause()
    study._pause()
    assert study.paused and launcher.signals == [("looks-P1-BN-lr0.01-s1", signal.SIGSTOP)]
    assert tool.main([file, "resume"]) == 0
    study._pause()
    assert not study.paused and launcher.signals[1:] == [("looks-P1-BN-lr0.01-s1", signal.SIGCONT)]


def test_an_interruption_stops_what_runs_and_the_next_call_goes_on_with_its_commit(
    write_plan, start, monkeypatch
):
    plan = write_plan()
    launcher = Pretended(at_once=False)

    def interrupt(study):
        if len(launcher.started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "_pause", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(plan, launcher)
    assert launcher.stopped == [folder.name for folder in launcher.started]
    assert not (plan.output / "running.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(plan.file.parent))
    monkeypatch.setattr(runner, "current_commit", lambda plan, dirty: "later")
    monkeypatch.setattr(runner, "checkout", lambda plan, commit: Path(commit))
    monkeypatch.setattr(runner, "measure", lambda run, folder: ({"box_ap": 1.0}, []))
    study = runner.Runner(plan, Pretended(), 2, blocks=["lr"])
    study.run()
    assert [r["commit"] for r in study.results.rows] == ["c0ffee", "c0ffee", "later", "later"]


def test_data_that_are_missing_are_named_before_anything_starts(write_plan, start, tmp_path):
    options = {"DATASETS.TRAIN": ["shapes_train"], "DATASETS.TEST": ["shapes_val"]}
    plan, launcher = write_plan(levels={"looks": {"options": options}}), Pretended()
    file = tmp_path / "shapes" / "annotations" / "instances_val.json"
    message = f"{plan.runs[0].id} needs {file}, which does not exist. `make datasets/study` draws"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(plan, launcher)
    assert not launcher.started and not plan.results.exists()


def test_a_result_that_no_runner_has_recorded_is_recorded_by_the_next_one(write_plan, start):
    plan = write_plan()
    launcher = Pretended(at_once=False)
    study = runner.Runner(plan, launcher, 1)
    study.bar = runner.tqdm(disable=True)
    study._start_next()
    launcher.at_once = True
    launcher.is_done(launcher.started[0])
    launcher = Pretended()
    study = start(plan, launcher, blocks=["lr"])
    assert plan.runs[0].id in study.rows and plan.runs[0].id not in launcher.names


def test_a_second_runner_is_refused_as_long_as_runs_of_the_first_are_there(write_plan, tmp_path):
    plan = write_plan()
    commands = [{"arguments": ["sleep", "60"], "creates": ""}]
    content = {"commands": commands, "folder": str(tmp_path), "environment": {}}
    (tmp_path / "job.json").write_text(json.dumps(content))
    with runner.only_runner(plan) as lock:
        launcher = runner.Local(lock)
        child = launcher.start(tmp_path)
    assert runner.is_running(plan)
    with pytest.raises(ValueError, match="lock is held: a runner of .* is at work, or runs that"):
        with runner.only_runner(plan):
            pass
    launcher.stop(child)
    assert not runner.is_running(plan)


def hours(minutes):
    return f"{minutes // 60} h {minutes % 60:02d} min"


def test_what_is_left_is_estimated_from_runs_that_are_alike(write_plan):
    plan = write_plan()
    bn, mabn, *_ = plan.block("lr").runs
    assert runner.remaining(plan, {}, 1) == "0 h 00 min and 10 runs of unknown length"
    results = {bn.id: row(bn, 1.0, seconds="6000")}
    assert runner.remaining(plan, results, 2) == "7 h 30 min"  # 9 * 100 minutes / 2
    results[mabn.id] = row(mabn, 1.0, seconds="18000")
    # BN: 1 + 2 left. MABN: 1 + 2. Its other name "buffer 4" is like both.
    assert runner.remaining(plan, results, 1) == hours(3 * 100 + 3 * 300 + 2 * 200)
    left = plan.block("lr").runs[2:]
    assert runner.remaining(plan, results, 1, left) == hours(100 + 300)
    folder = runner.folder_of(plan, left[0])
    folder.mkdir(parents=True)
    (folder / "seconds").write_text("1800")
    assert runner.remaining(plan, results, 1, left) == hours(70 + 300)


def test_rows_of_another_version_of_the_plan_or_another_learning_rate_are_noticed(
    write_plan, start
):
    study = start(write_plan(), Pretended())
    assert runner.outdated(study.plan, study.rows) == []
    swept = {run.id: run for run in study.plan.block("lr").runs}
    other = next(name for name, run in swept.items() if run.norm == "BN" and run.lr == 0.01)
    assert {row["lr"] for row in study.rows.values() if row["block"] == "main"} == {"0.02"}
    better = {**study.rows, other: {**study.rows[other], "box_ap": "99"}}
    assert runner.outdated(study.plan, better) == [
        run.id for run in study.plan.block("main").runs if run.norm == "BN"
    ]
    blocks = plan_of(Path())["blocks"]
    blocks["main"]["options"] = {"SOLVER.MAX_ITER": 9}
    plan = write_plan(blocks=blocks)
    assert runner.outdated(plan, study.rows) == [run.id for run in plan.block("main").runs]
    blocks["main"] = {**plan_of(Path())["blocks"]["main"], "weights": {"file": "a.pth"}}
    plan = write_plan(blocks=blocks)
    assert runner.outdated(plan, study.rows) == [run.id for run in plan.block("main").runs]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["status", "lr"], "status takes no block, got lr"),
        (["run", "--partition", "gpu"], "--partition and --cluster-option need --cluster"),
        (["run", "--cluster", "slurm", "--cluster-option", "a"], "--cluster-option takes KEY=VALUE, got a"),
    ],
)  # fmt: skip
def test_options_that_would_have_no_effect_are_refused(write_plan, arguments, message, capsys):
    with pytest.raises(SystemExit):
        load_tool("study").main([str(write_plan().file), *arguments])
    assert message in capsys.readouterr().err


def test_the_status_names_a_running_run_that_the_plan_has_no_longer(write_plan, capsys):
    plan = write_plan()
    folder = plan.output / "runs" / "gone" / "P1-BN-s1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0}')
    (plan.output / "running.json").write_text('{"jobs": 1, "running": ["gone/P1-BN-s1"]}')
    with runner.only_runner(plan):
        assert load_tool("study").main([str(plan.file), "status"]) == 0
    assert "running: gone/P1-BN-s1, iteration 20\n" in capsys.readouterr().out


def test_pausing_stops_a_runs_process_and_what_it_has_started(tmp_path):
    """With a real launcher."""
    count = tmp_path / "count"
    script = f"import time\nfor i in range(40): open({str(count)!r}, 'w').write(str(i)); time.sleep(0.05)"
    commands = [{"arguments": [sys.executable, "-c", script], "creates": ""}]
    content = {"commands": commands, "folder": str(tmp_path), "environment": {}}
    (tmp_path / "job.json").write_text(json.dumps(content))
    with open(tmp_path / "lock", "w") as lock:
        launcher = runner.Local(lock.fileno())
        process = launcher.start(tmp_path)
        while not count.exists():
            time.sleep(0.01)
        launcher.signal(process, signal.SIGSTOP)
        time.sleep(0.3)  # until it has
        stopped = count.read_text()
        time.sleep(0.5)
        assert count.read_text() == stopped and not launcher.is_done(process)
        launcher.signal(process, signal.SIGCONT)
        process.wait(60)
        assert count.read_text() == "39" and launcher.is_done(process)
        launcher.signal(process, signal.SIGSTOP)  # one that has ended is no error
        process = launcher.start(tmp_path)
        launcher.stop(process)
        assert process.returncode == -signal.SIGKILL


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    for name in ("tools/a.py", "configs/study/study.yaml", "docs/a.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(runner, "ROOT", root)
    return root


def test_runs_start_from_the_commit_and_not_from_what_is_edited(repository, write_plan):
    plan = write_plan()
    commit = runner.current_commit(plan, dirty=False)
    code = runner.checkout(plan, commit)
    assert runner.checkout(plan, commit) == code
    (repository / "docs" / "a.md").write_text("2")  # no run depends on it
    assert runner.current_commit(plan, dirty=False) == commit
    (repository / "tools" / "a.py").write_text("2")
    (repository / "configs" / "new.yaml").write_text("2")
    assert (code / "tools" / "a.py").read_text() == "1" and not (code / "configs/new.yaml").exists()
    with pytest.raises(
        ValueError, match="2 files are not committed: tools/a.py, configs/new.yaml. Commit"
    ):
        runner.current_commit(plan, dirty=False)
    assert runner.current_commit(plan, dirty=True) == f"{commit}+dirty"
    assert runner.checkout(plan, f"{commit}+dirty") == repository


def test_a_plan_that_is_edited_does_not_count_as_code(repository):
    file = repository / "configs" / "study" / "study.yaml"
    file.write_text(yaml.safe_dump(plan_of(repository)))
    assert "dirty" not in runner.current_commit(load_plan(file), dirty=False)


# ---- a run's process -----------------------------------------------------------------------------


def execute(folder, *scripts, creates=""):
    commands = [{"arguments": [sys.executable, "-c", s], "creates": creates} for s in scripts]
    (folder / "job.json").write_text(
        json.dumps({"commands": commands, "folder": str(folder), "environment": {"WORD": "said"}})
    )
    job.execute(folder)
    return json.loads((folder / "done.json").read_text())


def test_the_commands_of_a_run_follow_one_another_and_their_seconds_add_up(tmp_path):
    done = execute(tmp_path, "import time; time.sleep(0.3)", "import os; print(os.environ['WORD'])")
    assert done["error"] == "" and 0.3 <= done["seconds"] < 20 and "cores" in done["device"]
    assert (tmp_path / "output.txt").read_text() == "said\n"
    (tmp_path / "seconds").write_text("1000")  # of a call that was interrupted
    assert 1000.3 <= execute(tmp_path, "import time; time.sleep(0.4)")["seconds"] < 1020
    (tmp_path / "there").touch()
    execute(tmp_path, "print('again')", creates=str(tmp_path / "there"))
    assert "again" not in (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize(
    "script, error",
    [
        ("raise FloatingPointError('Loss became infinite')", "FloatingPointError: Loss became infinite (status 1)"),
        ("import sys; sys.exit('train_net.py: error: no such key')", "train_net.py: error: no such key (status 1)"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    ],
)  # fmt: skip
def test_a_process_that_fails_says_why_and_nothing_follows(tmp_path, script, error):
    assert execute(tmp_path, script, "print('next')")["error"] == error
    assert "next" not in (tmp_path / "output.txt").read_text().splitlines()


def test_the_time_in_which_a_run_is_stopped_does_not_count(tmp_path, monkeypatch):
    times = iter([0.0, 1.0, 101.0, 102.0])
    monkeypatch.setattr(job.time, "monotonic", lambda: next(times))

    class Process:
        returncode = None

        def wait(self, timeout):
            self.left = getattr(self, "left", 3) - 1
            if not self.left:
                self.returncode = 0

    clock = job._Clock(tmp_path)
    assert clock.wait(Process()) == 0
    assert clock.seconds == 1 + 2 * job.TICK + 1


# ---- submitit ------------------------------------------------------------------------------------


def test_a_cluster_without_submitit_is_refused_in_one_line(write_plan, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit):
        load_tool("study").main([str(write_plan().file), "run", "--cluster", "slurm"])
    assert capsys.readouterr().err.count("needs submitit: pip install submitit") == 1


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("submitit"), reason="submitit is missing")
def test_runs_can_be_submitted(write_plan, start, tmp_path, monkeypatch):
    plan = write_plan()
    launcher = runner.Cluster("local", tmp_path / "submitit", {"timeout_min": 2})
    quick = [{"arguments": [sys.executable, "-c", "print('trained')"], "creates": ""}]
    monkeypatch.setattr(runner.Runner, "_commands", lambda study, run, folder: quick)
    (tmp_path / "c0ffee").mkdir()
    study = start(plan, launcher, blocks=["lr"])
    assert len(study.rows) == 4 and {r["error"] for r in study.rows.values()} == {""}
    with pytest.raises(ValueError, match="--cluster: .*partitoin"):
        runner.Cluster("local", tmp_path / "submitit", {"slurm_partitoin": "gpu", "partitoin": 1})


# ---- what a run has found ------------------------------------------------------------------------


def test_a_run_is_measured_from_its_folder(write_plan, tmp_path):
    (run, *_) = write_plan().runs
    lines = [
        {"iteration": 1, "total_loss": 4.0},
        {"iteration": 3, "total_loss": 2.0},
        {"iteration": 3, "a/bbox/AP": 10.0, "a/segm/AP": 8.0, "b/bbox/AP": 30.0, "b/segm/AP": 1.0},
        {"iteration": 7, "total_loss": 1.0},
        {"iteration": 8, "a/bbox/AP": 20.0, "a/segm/AP": math.nan, "b/bbox/AP": 40.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "config.yaml").write_text("DATASETS: {TEST: !!python/tuple [a, b]}")
    (tmp_path / "at_start.json").write_text('{"a": {"bbox": {"AP": 5.0}, "segm": {"AP": 4.0}}}')
    values, curve = measure.measure(run, tmp_path)
    assert values == {
        "box_ap": 20.0, "mask_ap": 0.0, "iterations": 8, "last_aps": "10.0 20.0", "other_aps": "b=40.00",
        "ap_at_start": 5.0,
    }  # fmt: skip
    assert curve == [
        {"iteration": 0, "box_ap": 5.0, "mask_ap": 4.0},
        {"iteration": 4, "box_ap": 10.0, "mask_ap": 8.0, "loss": 3.0},
        {"iteration": 8, "box_ap": 20.0, "mask_ap": 0.0, "loss": 1.0},
    ]


def test_a_classifier_is_measured_by_its_error(write_plan, tmp_path):
    (run,) = write_plan(blocks={"fm": block(task="pictures", protocols="N4")}).runs
    lines = [{"iteration": 3, "total_loss": 2.0}, {"iteration": 4, "classification/top1": 82.5}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    values, curve = measure.measure(run, tmp_path)
    assert values == {"top1_error": 17.5, "iterations": 4, "last_aps": "17.5"}
    assert curve == [{"iteration": 4, "top1_error": 17.5, "loss": 2.0}]


def test_a_run_without_an_evaluation_is_refused(write_plan, tmp_path):
    (run,) = write_plan(blocks={"fm": block(task="pictures", protocols="N4")}).runs
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "total_loss": 2.0}')
    with pytest.raises(ValueError, match="holds no evaluation"):
        measure.measure(run, tmp_path)


# ---- tables, figures, document -------------------------------------------------------------------


def test_a_mean_has_its_standard_error():
    found = tables.mean([10.0, 12.0, 17.0])  # deviations -3, -1, 4: variance 26 / 2
    assert found.mean == 13 and found.error == pytest.approx(math.sqrt(13 / 3))
    assert str(found) == "13.0 ± 2.1"
    assert str(tables.mean([10.04])) == "10.0"
    with pytest.raises(ValueError):
        tables.mean([])


def test_a_difference_is_paired_by_seed_where_seeds_pair():
    found = tables.difference({1: 10.0, 2: 20.0, 3: 99.0}, {1: 8.0, 2: 16.0, 4: 0.0})
    assert found.mean == 3 and found.error == pytest.approx(1)  # of 2 and 4
    found = tables.difference({1: 10.0, 2: 12.0}, {3: 5.0, 4: 9.0})
    assert found.mean == 4 and found.error == pytest.approx(math.sqrt(1 + 4))


def results(plan, values):
    """Rows of the runs of `main` by norm and seed."""
    return {
        run.id: row(run, values[run.norm, run.seed], mask_ap="1", lr=0.01)
        for run in plan.block("main").runs
        if (run.norm, run.seed) in values
    }


def test_a_table_names_what_is_not_run_and_what_has_failed(write_plan):
    plan = write_plan()
    main = plan.block("main")
    rows = results(plan, {("BN", 1): 10, ("BN", 2): 14, ("MABN", 1): 20})
    failed = main.runs[5]  # of buffer 4
    rows[failed.id] = row(failed, error="NaN", lr=0.01)
    assert tables.block_table(main, rows).splitlines() == [
        "| box AP / mask AP | looks, P1                       |",
        "| ---------------- | ------------------------------- |",
        "| BN               | 12.0 ± 2.0 / 1.0 ± 0.0          |",
        "| MABN             | 20.0 / 1.0 (1 of 2 not run)     |",
        "| buffer 4         | (1 of 2 failed, 1 of 2 not run) |",
    ]
    assert "| MABN − BN        | 10.0 / 0.0 |" in tables.difference_table(main, rows)
    assert "not run" in tables.difference_table(main, {})
    assert tables.block_table(main, {}).count("not run") == 3


def test_a_table_of_what_starts_from_weights_has_the_result_before_the_first_step(write_plan):
    blocks = {"main": block(norms=["BN", "MABN"], lr=[0.01, 0.02], seeds=[1, 2])}
    (main,) = write_plan(blocks=blocks).blocks
    rows = {run.id: row(run, 5, mask_ap="1") for run in main.runs}
    assert "before" not in tables.block_table(main, rows)
    for run in main.runs:
        if run.norm == "BN":
            rows[run.id]["ap_at_start"] = str(run.seed)
    head, _, bn, mabn = (
        line.split("|")[1:-1] for line in tables.block_table(main, rows).splitlines()
    )
    assert head[1].strip() == "box AP before the first step"
    assert bn[1].strip() == "1.5 ± 0.5" and mabn[1].strip() == "-"


@pytest.fixture
def filled(write_plan):
    """A plan, its rows and its curves."""
    blocks = {
        "main": block(norms=["BN", "MABN", "BN(16)"], protocols=["P1", "P2"], levels="looks", seeds=[1, 2])
    }  # fmt: skip
    plan = write_plan(blocks=blocks)
    rows, curves = {}, {}
    for number, run in enumerate(plan.runs):
        rows[run.id] = row(
            run, number, mask_ap="1", ap_by_look=f"bright={number} dark=2", other_aps="part_train=30",
            device="a machine", commit="c0ffee", date="2026-01-02", torch="2.3.1",
        )  # fmt: skip
        curves[run.id] = [
            {"iteration": str(i), "box_ap": str(i * number), "mask_ap": "", "top1_error": ""}
            for i in (0, 5, 10)
        ]
    return plan, rows, curves


@pytest.mark.parametrize("kind", list(figures.FIGURES))
def test_each_figure_is_drawn(filled, kind, tmp_path, monkeypatch):
    plan, rows, curves = filled
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, picture: drawn.append(figure))
    figures.FIGURES[kind](plan, plan.block("main"), rows, curves, tmp_path / "a.png")
    (figure,) = drawn
    labels = figure.axes[-1].get_legend_handles_labels()[1]
    assert labels == ["BN", "MABN", "BN(16)"]
    if kind == "norm_batch":
        assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2", "16"]
    if kind == "curves":
        line = figure.axes[0].get_lines()[1]  # MABN with P1: runs 1 and 4
        assert list(line.get_xdata()) == [0, 5, 10] and list(line.get_ydata()) == [0, 12.5, 25]
    drawn.clear()
    figures.FIGURES[kind](plan, plan.block("main"), {}, {}, tmp_path / "a.png")
    assert drawn == []


def test_a_figure_over_norm_batches_keeps_levels_and_learning_rates_apart(
    write_plan, tmp_path, monkeypatch
):
    of_both = block(
        norms=["BN(16)"], levels=["looks", "alike"], lr=[0.01, 0.02], protocols=["P1", "P2"]
    )
    plan = write_plan(blocks={"main": of_both})
    rows = {run.id: row(run, number) for number, run in enumerate(plan.runs)}
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, picture: drawn.append(figure))
    figures.plot_norm_batch(plan, plan.block("main"), rows, {}, tmp_path / "a.png")
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["looks, LR 0.01", "looks, LR 0.02", "alike, LR 0.01", "alike, LR 0.02"]
    expected = [
        [float(rows[run.id]["box_ap"]) for run in plan.runs if (run.level, run.lr) == group]
        for group in [("looks", 0.01), ("looks", 0.02), ("alike", 0.01), ("alike", 0.02)]
    ]
    assert [list(axes.get_lines()[0].get_ydata()) for axes in figure.axes] == expected


def test_norms_of_a_figure_differ_in_colour_or_line(filled):
    plan, *_ = filled
    study = load_plan(CONFIGS / "study" / "shapes.yaml")
    for some in (plan, study):
        styles = [tuple(figures._style(some, norm).values()) for norm in some.norms]
        assert len(set(styles)) == len(styles)


def test_the_document_keeps_what_is_written_by_hand_and_renews_the_rest(filled):
    plan, rows, curves = filled
    document.write_document(plan, {}, {})
    text = plan.document.read_text()
    assert "## main" in text and "| BN               | not run" in text
    written = text.replace("## main", "## What was found\n\nBN is worse.")
    plan.document.write_text(
        written + "\n<!-- generated: looks main -->\nold\n<!-- end -->\nThe end.\n"
    )
    document.write_document(plan, rows, curves)
    text = plan.document.read_text()
    assert "## What was found\n\nBN is worse." in text and text.endswith("The end.\n")
    assert "1.5 ± 1.5" in text and "12 of 12 runs" in text and "old" not in text
    assert "![curves: main](images/study_main_curves.png)" in text
    assert (plan.images / "study_main_curves.png").stat().st_size > 5000
    before = text
    document.write_document(plan, rows, curves)
    assert plan.document.read_text() == before
    plan.document.write_text("<!-- generated: pie main -->\n<!-- end -->")
    with pytest.raises(ValueError, match="no part of kind 'pie'; there are runs, table"):
        document.write_document(plan, rows, curves)
    plan.document.write_text("<!-- generated: table maim -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"has no block 'maim' \(similar is main\)"):
        document.write_document(plan, rows, curves)


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs start from a commit")
def test_a_study_that_is_interrupted_goes_on_where_it_was(tmp_path):
    make_synthetic_coco(tmp_path, layout="shapes", train=6, val=2, size=64)
    options = {
        "TEST.EVAL_PERIOD": 6,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "DATASETS.TEST": ["shapes_val", "shapes_train"],
    }
    shapes = {"tool": "train_net", "config": str(INSTANT), "norm": NORM_KEYS, "options": options}
    weights = {"run": "main/P1-BN-lr0.01-s1", "import": "exact"}
    blocks = {
        "main": block(norms=["BN"], options={"SOLVER.MAX_ITER": 24}),
        "tune": block(norms=["MABN"], weights=weights, lr=0.001),
    }
    file = tmp_path / "study.yaml"
    content = plan_of(tmp_path, tasks={"shapes": shapes}, blocks=blocks)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    plan = load_plan(file)
    command = [sys.executable, str(ROOT / "tools" / "study.py"), str(file)]
    options = dict(
        env={**environment(tmp_path), "PYTHONPATH": str(ROOT)}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    process = subprocess.Popen([*command, "run", "--dirty"], **options)
    folder = runner.folder_of(plan, plan.runs[0])
    deadline = time.monotonic() + 300
    while not (folder / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (plan.output / "PAUSE").touch()  # a paused run is interrupted, too
    running = subprocess.run([*command, "status"], **options)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    (plan.output / "PAUSE").unlink()
    assert process.returncode == 130 and "interrupted; run it again" in out
    assert f"running: {plan.runs[0].id}, iteration" in running.stdout, running.stdout
    assert running.stdout.endswith(", paused\n")
    assert not (folder / "done.json").exists() and not runner.is_running(plan)

    done = subprocess.run([*command, "run", "--dirty"], **options)
    assert done.returncode == 0, done.stdout
    assert "Starting training from iteration 0" in (log := (folder / "output.txt").read_text())
    begun = [line for line in log.splitlines() if "Starting training from iteration" in line]
    assert len(begun) == 2 and not begun[1].endswith(" 0")
    trained, tuned = runner.open_results(plan)[0].rows
    assert trained["error"] == tuned["error"] == "" and trained["iterations"] == "24"
    assert tuned["weights"] == trained["run"] and tuned["ap_at_start"] == trained["box_ap"]
    # The second data set has not overwritten what the first one's measures come from.
    assert trained["found"] and trained["other_aps"].startswith("shapes_train=")
    detections = folder / "inference" / "coco_instances_results.json"
    assert len({found["image_id"] for found in json.loads(detections.read_text())}) <= 2
    assert (folder / "inference" / "shapes_train" / detections.name).exists()
    shown = subprocess.run([*command, "table", "main"], **options).stdout
    assert "## main" in shown and "not run" not in shown
    remove_worktrees(tmp_path / "out")


def remove_worktrees(output):
    for worktree in (output / "worktrees").glob("*"):
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", worktree], check=True)


def detections_at_start(plan, run):
    folder = runner.folder_of(plan, run) / "at_start" / "inference"
    return json.loads((folder / "coco_instances_results.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs start from a commit")
def test_the_plan_of_fine_tuning_runs_from_sources_to_fine_tuned_detectors(data, tmp_path):
    content = yaml.safe_load((CONFIGS / "study" / "finetune.yaml").read_text())
    content.update(
        output=str(tmp_path / "out"),
        results=str(tmp_path / "a.csv"),
        document=str(tmp_path / "a.md"),
    )
    few = {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": [1], "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    for name in ("source", "near", "far"):
        task = content["tasks"][name]
        task["options"] = {**task.get("options", {}), **few, "INPUT.MIN_SIZE_TEST": 64}
    content["tasks"]["classifier"]["options"] = {"train.max_iter": 4}
    exact = [
        "MABN exact", "MABN exact, mean absorbed", "MABN exact, shift follows the mean",
        "MABN exact, affine weights",
    ]  # fmt: skip
    norms = {
        "near": ["FrozenBN", "MABN exact"],
        "far": ["from scratch", "FrozenBN", *exact, "MABN, weights of MABN"],
    }
    blocks = content["blocks"]
    for name in ("detector", "classifier", "classifier-mabn", *norms):
        blocks[name]["seeds"] = 1
        blocks[name].pop("differences", None)
    for name, some in norms.items():
        blocks[name].update(norms=some, lr=0.001)
        del blocks[f"lr-{name}"]
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, str(ROOT / "tools" / "study.py"), str(file), "run", "--dirty"]
    env = {**environment(data), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = load_plan(file)
    rows = {row["run"]: row for row in runner.open_results(plan)[0].rows}
    assert {row["error"] for row in rows.values()} == {""} and len(rows) == 12
    assert rows["far/content-P1-from_scratch-lr0.001-s1"]["ap_at_start"] == ""
    assert {run.weights for run in plan.block("near").runs} == {"detector/content-P1-BN-lr0.02-s1"}
    # Before the first step, by the same function.
    for first, *others in (plan.block("near").runs, plan.block("far").runs[1:6]):
        assert rows[first.id]["ap_at_start"]
        expected = detections_at_start(plan, first)
        assert len(expected) > 10
        for other in others:
            found = detections_at_start(plan, other)
            assert len(found) == len(expected), other.id
            for got, wanted in zip(found, expected):
                assert got["category_id"] == wanted["category_id"]
                np.testing.assert_allclose(got["bbox"], wanted["bbox"], atol=0.01)
                np.testing.assert_allclose(got["score"], wanted["score"], atol=1e-4)
    runs = {run.norm: run for run in plan.block("far").runs}
    for norm in exact:
        log = (runner.folder_of(plan, runs[norm]) / "output.txt").read_text()
        of = (
            r"0 norms with statistics and of [1-9]\d*"
            if "affine" in norm
            else r"[1-9]\d* norms with statistics and of 0"
        )
        assert re.search(f"{of} affine maps is kept", log), norm
    remove_worktrees(plan.output)
