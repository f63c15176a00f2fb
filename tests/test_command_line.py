"""A user's code and data from the command line of the tools, with real processes."""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog

from mabn_d2.data import make_synthetic_coco
from mabn_d2.plugin import load_config
from mabn_d2.plugin.command_line import (
    add_arguments,
    bring_in,
    set_lazy_num_classes,
    set_num_classes,
)

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
INSTANT = CONFIGS / "quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn_instant.yaml"
MASK_RCNN = CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_mabn"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A data set of three categories in COCO's format, and a norm in a file."""
    folder = tmp_path_factory.mktemp("mine")
    shapes = make_synthetic_coco(folder, layout="shapes", train=6, val=2, size=64)
    for split in ("train", "val"):
        content = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        content["categories"] = content["categories"][:3]
        for annotation in content["annotations"]:
            annotation["category_id"] = (annotation["category_id"] - 1) % 3 + 1
        (folder / f"{split}.json").write_text(json.dumps(content))
    (folder / "my_norm.py").write_text(
        textwrap.dedent(
            """
            from mabn_d2 import NORM_REGISTRY, MABN2d
            from mabn_d2.layers.options import PositiveNumber, checked


            @NORM_REGISTRY.register
            class Loud(MABN2d):
                @checked
                def __init__(self, num_features, gain: PositiveNumber = 1.0, affine=True):
                    super().__init__(num_features, affine=affine)
                    self.gain = gain

                def forward(self, x):
                    return self.gain * super().forward(x)
            """
        )
    )
    return folder


@pytest.fixture
def catalog():
    """What a test registers is forgotten."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def coco_data(folder, name="mine", split="train"):
    return f"--coco-data={name}_{split}={folder / split}.json:{folder / 'shapes' / split}"


def arguments(*options, config=INSTANT, opts=()):
    args = add_arguments(argparse.ArgumentParser()).parse_args([*map(str, options)])
    args.config_file, args.opts = str(config), list(opts)
    return args


def run(tool, *options, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, options)],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def error_line(done):
    lines = [l for l in done.stdout.splitlines() if "arn" not in l and "pkg_resources" not in l]
    assert done.returncode != 0 and len(lines) == 1, done.stdout
    return lines[0]


@pytest.mark.slow
def test_one_command_trains_on_own_data_with_an_own_norm_and_its_run_is_reported(mine, tmp_path):
    bring = [f"--import={mine / 'my_norm.py'}", coco_data(mine), coco_data(mine, split="val")]
    done = run(
        "train_net.py", "--num-gpus=2", "--config-file", INSTANT, *bring,
        "DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)",
        "MODEL.RESNETS.NORM", "Loud", "MODEL.Loud.GAIN", "2", "SOLVER.MAX_ITER", "3",
        "OUTPUT_DIR", "output", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Loud(64" in done.stdout
    weights = torch.load(tmp_path / "output/model_final.pth")["model"]
    assert weights["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3 + 1
    assert weights["backbone.bottom_up.stem.conv1.norm.psi.count"] == 3

    refused = run("train_net.py", "--resume", "--config-file", INSTANT, *bring,
                  "DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)",
                  "OUTPUT_DIR", "output", cwd=tmp_path)  # fmt: skip
    assert "trained by 2 workers, it cannot go on with 1" in error_line(refused)

    assert "Loud" in error_line(run("report.py", "output", cwd=tmp_path))
    done = run("report.py", "output", *bring, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "output/predictions.png").exists(), done.stdout


@pytest.mark.parametrize("tool", ["train_net.py", "lazyconfig_train_net.py", "report.py"])
def test_what_does_not_exist_is_named_in_one_line_before_anything_starts(tmp_path, tool):
    words = ["output"] if tool == "report.py" else ["--config-file", INSTANT]
    line = error_line(run(tool, "--import=absent.py", *words, cwd=tmp_path))
    assert f"{tool}: error: --import: absent.py does not exist" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, message",
    [
        ("--import=no_such_module", "--import no_such_module: ModuleNotFoundError"),
        ("--coco-data=mine", "--coco-data must be NAME=ANNOTATIONS.json:IMAGES, got 'mine'"),
        ("--coco-data=mine=absent.json:.", "--coco-data mine: absent.json is not a file"),
        (f"--coco-data=mine={INSTANT}:absent", "--coco-data mine: absent is not a folder"),
    ],
)
def test_what_cannot_be_brought_in_is_named(option, message):
    with pytest.raises(ValueError) as error:
        bring_in(arguments(option))
    assert message in str(error.value)


def test_an_error_in_what_is_imported_is_named_with_its_line(tmp_path):
    (tmp_path / "broken_norm.py").write_text("x = 1\nunknown_name\n")
    with pytest.raises(ValueError, match=r"NameError: .*unknown_name.*broken_norm\.py, line 2\)"):
        bring_in(arguments(f"--import={tmp_path / 'broken_norm.py'}"))


def test_a_file_named_as_another_module_is_refused(tmp_path):
    (tmp_path / "argparse.py").write_text("")
    with pytest.raises(ValueError, match="argparse.py has the name of another module"):
        bring_in(arguments(f"--import={tmp_path / 'argparse.py'}"))


def test_a_name_of_another_data_set_is_refused_and_the_same_again_is_not(mine, catalog):
    bring_in(arguments(coco_data(mine)))
    bring_in(arguments(coco_data(mine)))
    assert len(DatasetCatalog.get("mine_train")) == 6
    with pytest.raises(ValueError, match="--coco-data mine_train: a data set of this name exists"):
        bring_in(arguments(coco_data(mine).replace("/train.json", "/val.json")))


# ---- the number of classes -----------------------------------------------------------------------


def num_classes(args):
    bring_in(args)
    cfg = load_config(args.config_file, args.opts)
    set_num_classes(cfg, args)
    assert load_config(args.config_file, args.opts) == cfg  # a worker gets it by the command line
    return cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES


TRAIN = ["DATASETS.TRAIN", "('mine_train',)"]


def test_the_number_of_classes_is_that_of_the_training_data(mine, catalog):
    assert num_classes(arguments(coco_data(mine), opts=TRAIN)) == (3, 3)
    assert num_classes(arguments(coco_data(mine), opts=[])) == (6, 80)  # trains on another set


def test_the_number_of_classes_that_the_command_line_or_the_file_states_stays(
    mine, catalog, tmp_path
):
    opts = [*TRAIN, "MODEL.ROI_HEADS.NUM_CLASSES", "5"]
    assert num_classes(arguments(coco_data(mine), opts=opts)) == (5, 3)
    file = tmp_path / "mine.yaml"
    file.write_text(f'_BASE_: "{INSTANT}"\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 4}}}}\n')
    assert num_classes(arguments(coco_data(mine), config=file, opts=TRAIN)) == (4, 3)


def test_annotations_of_another_format_are_named(mine, catalog, tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "shapes/train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--coco-data mine_train: .*train\.json is not in COCO's"):
        num_classes(arguments(coco_data(tmp_path), opts=TRAIN))


def test_a_lazy_config_gets_the_number_of_classes_too(mine, catalog):
    args = arguments(coco_data(mine), opts=["model.roi_heads.mask_head.num_classes=7"])
    bring_in(args)
    cfg = LazyConfig.load(f"{MASK_RCNN}.py")
    set_lazy_num_classes(cfg, args)
    assert cfg.model.roi_heads.num_classes == 80  # trains on another data set
    cfg.dataloader.train.dataset.names = "mine_train"
    set_lazy_num_classes(cfg, args)
    assert cfg.model.roi_heads.num_classes == cfg.model.roi_heads.box_predictor.num_classes == 3
    assert "model.roi_heads.num_classes=3" in args.opts
    assert not any(option == "model.roi_heads.mask_head.num_classes=3" for option in args.opts)
