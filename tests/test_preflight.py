"""What is wrong with a config or a data set is found before the training starts, by name."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNNWithTTA
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from mabn_d2 import add_mabn_config
from mabn_d2.data import make_synthetic_coco
from mabn_d2.data.loader import build_train_loader
from mabn_d2.engine import Trainer, load_lazy_config, preflight
from mabn_d2.engine.preflight.values import leaves
from mabn_d2.plugin import load_config

from .helpers import CONFIGS, INSTANT

LAZY = CONFIGS / "COCO-InstanceSegmentation" / "scratch_mask_rcnn_R_50_FPN_2x_mabn.py"
TINY_MODEL = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16,
              "MODEL.ROI_BOX_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Names of a training and of a test set in COCO's format."""
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, layout="shapes", train=4, val=2, size=64)
    names = []
    for split in ("train", "val"):
        names.append(f"preflight_{split}")
        file = folder / "shapes" / "annotations" / f"instances_{split}.json"
        register_coco_instances(names[-1], {}, str(file), str(folder / "shapes" / split))
        DatasetCatalog.get(names[-1])  # fills in the classes
    yield names
    for name in names:
        remove(name)


def remove(name):
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def register():
    """Registers what a user's function returns, for the time of a test."""
    names = []

    def register(data, **metadata):
        names.append(f"users_own_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: data)
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield register
    for name in names:
        remove(name)


def config(names, output, *options, file=INSTANT):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names[0],), (names[1],)
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = str(output), "cpu"
    cfg.merge_from_list([str(option) for option in options])
    return cfg


def check(cfg, *arguments):
    return preflight.check(cfg, default_argument_parser().parse_args(arguments))


def assert_refused(cfg, *words, arguments=()):
    with pytest.raises(ValueError) as error:
        check(cfg, *arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


# ---- values --------------------------------------------------------------------------------------


def keys():
    cfg = get_cfg()
    add_mabn_config(cfg)
    return dict(leaves(cfg))


MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS")


@pytest.mark.parametrize("wrong", [None, object, "text", 2.5, [None], {"KEY": 1}], ids=repr)
def test_every_key_refuses_a_value_of_another_type(shapes, tmp_path, wrong):
    base = config(shapes, tmp_path / "output")
    assert len(keys()) > 180
    for key, default in keys().items():
        if wrong is None and key in MAY_BE_NONE or type(wrong) is type(default) and wrong != [None]:
            continue
        if type(default) is float and wrong == 2.5 or default is None and type(wrong) is float:
            continue
        cfg = base.clone()
        with pytest.raises(ValueError) as error:
            cfg.merge_from_list([key, wrong])
            check(cfg)
        assert key in str(error.value) and "\n" not in str(error.value), key


def groups(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield prefix + key
            yield from groups(value, f"{prefix}{key}.")


@pytest.mark.parametrize("wrong", [None, CfgNode()], ids=["None", "empty"])
def test_every_group_of_keys_refuses_another_value_as_a_whole(shapes, tmp_path, wrong):
    base = config(shapes, tmp_path / "output")
    for group in groups(base):
        cfg = base.clone()
        *path, last = group.split(".")
        node = cfg
        for key in path:
            node = node[key]
        if not node[last]:
            continue
        node[last] = wrong
        assert_refused(cfg, group)


@pytest.mark.parametrize(
    "options, message",
    [
        (["SOLVER.STEPS", "('a',)"], "SOLVER.STEPS must be a list of elements, each a positive int"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD must be a positive integer, got 0"),
        (["SOLVER.MAX_ITER", -3], "SOLVER.MAX_ITER must be a positive integer, got -3"),
        (["SOLVER.WARMUP_METHOD", "linaer"], "SOLVER.WARMUP_METHOD must be 'linear' or 'constant'"),
        (["SOLVER.IMS_PER_BATCH", 3], r"SOLVER.IMS_PER_BATCH must be .* workers \(2\), got 3"),
        (["SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_WORLD_SIZE", 8], "of SOLVER.REFERENCE_WORLD"),
        (["SOLVER.AMP.ENABLED", True], "SOLVER.AMP.ENABLED needs a GPU"),
        (["SOLVER.VIRTUAL_WORKERS", 0], "SOLVER.VIRTUAL_WORKERS must be a positive integer, got 0"),
        (["SOLVER.VIRTUAL_WORKERS", 2], "SOLVER.VIRTUAL_WORKERS 2 are those of one process, got --num-gpus for 2"),
        (["INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT must be 'polygon' or 'bitmask', got 'rle'"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN must be a list of at least 1 element"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [384, 600]], "INPUT.CROP.SIZE must be at mo"),
        (["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"], "DATALOADER.SAMPLER_TRAIN must be"),
        (["MODEL.ROI_HEADS.NAME", "RoIHeads"], "MODEL.ROI_HEADS.NAME must be a name in .*'RoIHeads'"),
        (["MODEL.PIXEL_MEAN", [1.0]], "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD .* got 1 and 3"),
        (["MODEL.RPN.IOU_LABELS", [0, 1]], "MODEL.RPN.IOU_LABELS must have one more element than"),
        (["MODEL.RPN.BATCH_SIZE_PER_IMAGE", -1], "MODEL.RPN.BATCH_SIZE_PER_IMAGE must be a positive"),
        (["MODEL.NORM_BATCH_SIZE", -2], "MODEL.NORM_BATCH_SIZE must be a non-negative integer"),
        (["MODEL.WEIGHTS", CONFIGS], "MODEL.WEIGHTS: .*configs is a folder"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN names no data set"),
        (["MODEL.LOAD_PROPOSALS", True], "DATASETS.PROPOSAL_FILES_TRAIN must name one file for each"),
        (["TEST.EXPECTED_RESULTS", [["bbox", 38.5]]], r"TEST.EXPECTED_RESULTS .*\[task, metric, val"),
        (["SEED", 2**32], "SEED must be an integer below"),
        (["OUTPUT_DIR", INSTANT / "run"], "OUTPUT_DIR: .* is a file"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_accepted(shapes, tmp_path, options, message):
    cfg = config(shapes, tmp_path / "output", *options)
    with pytest.raises(ValueError, match=message) as error:
        check(cfg, "--num-gpus", "2")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


def test_no_virtual_workers_are_refused_as_the_config_is_read():
    with pytest.raises(
        ValueError, match="SOLVER.VIRTUAL_WORKERS must be a positive integer, got 0"
    ):
        load_config(str(INSTANT), ["SOLVER.VIRTUAL_WORKERS", 0])


@pytest.mark.parametrize(
    "key", ["SOLVER.AMP.ENABLED", "TEST.PRECISE_BN.ENABLED", "STATISTICS.ENABLED", "MODEL.MBN.DOUBLE_FORWARD"]
)  # fmt: skip
def test_what_virtual_workers_do_not_go_with_is_named(shapes, tmp_path, key):
    norm = ["MODEL.RESNETS.NORM", "MBN"] if "MBN" in key else []
    cfg = config(shapes, tmp_path / "output", "SOLVER.VIRTUAL_WORKERS", 2, key, True, *norm)
    assert_refused(cfg, f"SOLVER.VIRTUAL_WORKERS 2 needs {key} False")


@pytest.mark.parametrize(
    "options, words",
    [
        (["MODEL.RESNETS.DEPTH", 51], ("model", "51")),
        (["MODEL.FPN.IN_FEATURES", ["res9"]], ("model", "KeyError: res9", "in_features")),
        (["SOLVER.STEPS", (2, 1), "SOLVER.MAX_ITER", 5], ("LR schedule", "milestone")),
        (["MODEL.KEYPOINT_ON", True], ("mapper", "keypoint_names")),
    ],
)
def test_what_cannot_be_built_is_found_by_building_it(shapes, tmp_path, options, words):
    assert_refused(config(shapes, tmp_path / "output", *options), "cannot be built", *words)


class ReadsItsValues(nn.Module):
    """Asks its tensors for their values while it is built, as stochastic depth does."""

    def __init__(self, cfg):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.layer = nn.Linear(2, 2)


def test_a_model_that_cannot_be_built_without_memory_is_built_with_it(shapes, tmp_path):
    META_ARCH_REGISTRY.register(ReadsItsValues)
    try:
        name = ReadsItsValues.__name__
        assert not check(config(shapes, tmp_path, "MODEL.META_ARCHITECTURE", name))
    finally:
        META_ARCH_REGISTRY._obj_map.pop(ReadsItsValues.__name__)


FILES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "study"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_passes(shapes, tmp_path, path):
    cfg = config(shapes, tmp_path / "output", "MODEL.WEIGHTS", "", file=path)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or cfg.SOLVER.IMS_PER_BATCH
    if cfg.MODEL.KEYPOINT_ON or "Panoptic" in cfg.MODEL.META_ARCHITECTURE:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # the shapes have neither
        assert_refused(cfg, "DATASETS.TRAIN names no data set", arguments=["--num-gpus", "1"])
    else:
        check(cfg, "--num-gpus", str(1 if torch.cuda.is_available() else reference))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--num-gpus", "0"], ["--num-gpus must be a positive integer, got 0"]),
        (["--num-machines", "-1"], ["--num-machines must be a positive integer, got -1"]),
        (["--machine-rank", "1"], ["--machine-rank must be in 0 .. 0", "got 1"]),
        (["--num-machines", "2", "--dist-url", "auto"], ["--dist-url auto is for one machine"]),
        (
            ["--num-machines", "2", "--dist-url", "host:1"],
            ["--dist-url must be auto or", "'host:1'"],
        ),
    ],
)
def test_a_wrong_option_of_the_command_line_is_named(shapes, tmp_path, arguments, words):
    assert_refused(config(shapes, tmp_path), *words, arguments=arguments)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>sign in</html>", "is no checkpoint: it is a web page"),
        (b"\n <html>", "is no checkpoint: it is a web page"),
        (b"just some text", "is no checkpoint: it is damaged or of another format"),
        (b"", "is no checkpoint: it is empty"),
    ],
)
def test_weights_that_are_no_checkpoint_are_named(shapes, tmp_path, content, words):
    (tmp_path / "weights.pth").write_bytes(content)
    cfg = config(shapes, tmp_path, "MODEL.WEIGHTS", tmp_path / "weights.pth")
    assert_refused(cfg, "MODEL.WEIGHTS: ", tmp_path / "weights.pth", words)


def test_a_checkpoint_passes_and_is_not_needed_to_resume(shapes, tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pth")
    assert not check(config(shapes, tmp_path, "MODEL.WEIGHTS", tmp_path / "weights.pth"))
    cfg = config(shapes, tmp_path, "MODEL.WEIGHTS", "moved/away.pth")
    assert_refused(cfg, "MODEL.WEIGHTS", arguments=["--resume"])  # there is nothing to resume
    (tmp_path / "last_checkpoint").write_text("weights.pth")
    assert not check(cfg, "--resume")


# ---- options that Detectron2's trainer would ignore ----------------------------------------------


def test_keypoint_sigmas_reach_the_evaluator(shapes, tmp_path):
    sigmas = [0.1, 0.2]
    cfg = config(shapes, tmp_path, "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    assert Trainer.build_evaluator(cfg, shapes[1])._kpt_oks_sigmas == sigmas
    cfg.MODEL.KEYPOINT_ON = True
    assert_refused(cfg, "TEST.KEYPOINT_OKS_SIGMAS", "NUM_KEYPOINTS 17, got 2")


@pytest.mark.parametrize(
    "options",
    [
        ["GLOBAL.HACK", 2.0],
        ["MODEL.PANOPTIC_FPN.COMBINE.ENABLED", False],
        ["VERSION", 1],
        ["DATASETS.PROPOSAL_FILES_TEST", ("boxes.pkl",)],
    ],
)
def test_a_key_without_effect_is_refused(shapes, tmp_path, options):
    assert_refused(config(shapes, tmp_path, *options), options[0])


@pytest.mark.parametrize(
    "option", ["MODEL.META_ARCHITECTURE RetinaNet", "MODEL.KEYPOINT_ON True"], ids=str
)
def test_test_time_augmentation_is_refused_where_detectron2_has_none(shapes, tmp_path, option):
    cfg = config(shapes, tmp_path, "TEST.AUG.ENABLED", True, *option.split())
    assert_refused(cfg, "TEST.AUG.ENABLED needs", option.split()[0])


def test_test_time_augmentation_runs_once_more_and_reports_beside_the_plain_evaluation(
    shapes, tmp_path, monkeypatch
):
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "SOLVER.MAX_ITER", 1]
    cfg = config(shapes, tmp_path, *options, *TINY_MODEL)
    sizes = []
    forward = GeneralizedRCNNWithTTA.__call__

    def record(model, images):
        sizes.append(len(images))
        return forward(model, images)

    monkeypatch.setattr(GeneralizedRCNNWithTTA, "__call__", record)
    Trainer(cfg).train()
    assert sizes == [1, 1]  # both images, once
    metrics = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    for name in ("bbox", "segm"):
        assert f"{name}/AP" in metrics and f"{name}_TTA/AP" in metrics
    results = [
        tmp_path / folder / "inference/coco_instances_results.json" for folder in ("", "tta")
    ]
    assert results[0].exists() and results[1].exists()
    assert results[0].read_text() != results[1].read_text()


# ---- data sets -----------------------------------------------------------------------------------


def image(tmp_path, *annotations):
    file = tmp_path / "image.png"
    file.write_bytes(b"")
    return {"file_name": str(file), "height": 64, "width": 64, "annotations": list(annotations)}


def annotation(**parts):
    square = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]
    whole = {"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": 0, "segmentation": square}
    return {k: v for k, v in {**whole, **parts}.items() if v is not None}


RLE = {"size": [64, 64], "counts": b"PPP"}


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"segmentation": RLE}, ["is no polygon", "set INPUT.MASK_FORMAT to bitmask"]),
        ({"segmentation": np.zeros((64, 64), bool)}, ["set INPUT.MASK_FORMAT to bitmask"]),
        ({"segmentation": None}, ["has no segmentation"]),
        ({"segmentation": [[0.0, 1.0, 2.0, 3.0]]}, ["fewer than 6"]),
        ({"category_id": 6}, ["category_id 6", "MODEL.ROI_HEADS.NUM_CLASSES is 6", "7 or more"]),
        ({"category_id": -1}, ["category_id -1"]),
        ({"category_id": "cat"}, ["category_id 'cat'"]),
        ({"bbox": None}, ["has no bbox"]),
        ({"bbox_mode": None}, ["has no bbox_mode"]),
    ],
)
def test_an_annotation_that_ends_the_training_is_named(shapes, tmp_path, register, broken, words):
    whole = annotation(category_id=np.int64(5))
    data = [image(tmp_path, whole), image(tmp_path, whole, annotation(**broken))]
    cfg = config([register(data), shapes[1]], tmp_path / "output")
    place = ["DATASETS.TRAIN: users_own_0", data[1]["file_name"], "annotation 1"]
    assert_refused(cfg, *place, *words)
    assert not check(cfg, "--eval-only")
    data[1]["annotations"][1]["iscrowd"] = 1  # these are not trained on
    assert not check(cfg)


def test_each_kind_of_model_is_checked_for_what_it_takes(shapes, tmp_path, register):
    masks = config([register([image(tmp_path, annotation(segmentation=RLE))]), shapes[1]], tmp_path)
    assert_refused(masks, "INPUT.MASK_FORMAT")
    masks.INPUT.MASK_FORMAT = "bitmask"
    check(masks)
    boxes = config(masks.DATASETS.TRAIN + ("",), tmp_path, file=CONFIGS / "Base-RetinaNet.yaml")
    boxes.DATASETS.TEST, boxes.MODEL.WEIGHTS, boxes.MODEL.RETINANET.NUM_CLASSES = (), "", 3
    check(boxes, "--num-gpus", "1")
    over = image(tmp_path, annotation(category_id=3, segmentation=None))
    boxes.DATASETS.TRAIN = (register([over]),)
    assert_refused(boxes, "MODEL.RETINANET.NUM_CLASSES is 3")


class Stream(IterableDataset):
    def __iter__(self):
        return itertools.repeat({})


def test_a_stream_is_refused_without_reading_it(shapes, tmp_path, register):
    endless = itertools.repeat({})
    for data in (Stream(), endless, (x for x in endless)):
        cfg = config([register(data), shapes[1]], tmp_path)
        assert_refused(cfg, "DATASETS.TRAIN", type(data).__name__, "must have a length")


class Lazily(Dataset):
    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        raise AssertionError("reads a file")


def test_a_data_set_that_reads_on_demand_is_not_read(shapes, tmp_path, register):
    assert not check(config([register(Lazily()), shapes[1]], tmp_path))


def test_an_empty_data_set_missing_images_and_a_function_that_fails_are_named(
    shapes, tmp_path, register
):
    assert_refused(config([register([]), shapes[1]], tmp_path), "users_own_0 has no images")
    missing = {**image(tmp_path), "file_name": "no/such.png"}
    assert_refused(config([register([missing]), shapes[1]], tmp_path), "no/such.png does not exist")
    DatasetCatalog.register("fails", lambda: {}["key"])
    try:
        assert_refused(
            config(["fails", shapes[1]], tmp_path), "fails cannot be read: KeyError: key"
        )
    finally:
        remove("fails")


def test_more_classes_than_the_data_has_are_warned_of(shapes, tmp_path):
    assert check(config(shapes, tmp_path)) == []
    (warning,) = check(config(shapes, tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 80))
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 80, preflight_train has 6 classes" in warning


@pytest.mark.parametrize("part", ["area", "iscrowd"])
def test_a_coco_file_that_the_evaluation_ends_at_is_named(shapes, tmp_path, register, part):
    content = json.loads(Path(MetadataCatalog.get(shapes[1]).json_file).read_text())
    del content["annotations"][2][part]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    name = register([], evaluator_type="coco", json_file=str(file))
    number = content["annotations"][2]["id"]
    words = ["DATASETS.TEST", name, f"annotation {number} in {file} has no {part}"]
    assert_refused(config([shapes[0], name], tmp_path), *words)
    # Training needs neither.
    classes = list("abcdef")
    data = [image(tmp_path, annotation())]
    train = register(data, json_file=str(file), thing_classes=classes)
    assert check(config([train, shapes[1]], tmp_path)) == []


@pytest.mark.parametrize("metadata", [{}, {"evaluator_type": "users_own"}], ids=["none", "unknown"])
def test_a_data_set_without_an_evaluator_is_warned_of_and_trained_with(
    shapes, tmp_path, register, caplog, metadata
):
    name = register(DatasetCatalog.get(shapes[1]), **metadata)
    options = ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, *TINY_MODEL]
    cfg = config([shapes[0], name], tmp_path, *options)
    (warning,) = check(cfg)
    assert f"DATASETS.TEST: {name}" in warning and "is not evaluated" in warning
    assert_refused(cfg, name, "evaluator_type", arguments=["--eval-only"])
    with caplog.at_level(logging.WARNING):
        Trainer(cfg).train()
    assert f"{name} is not evaluated" in caplog.text
    assert (tmp_path / "model_final.pth").exists()


def test_the_training_data_is_read_once_by_a_single_worker(shapes, tmp_path, register):
    reads = []
    name = register(None)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: reads.append(1) or [image(tmp_path, annotation())])
    cfg = config([name, shapes[1]], tmp_path)
    check(cfg, "--eval-only")
    assert len(reads) == 0
    check(cfg)
    build_train_loader(cfg)  # takes over what was read
    assert len(reads) == 1
    build_train_loader(cfg)
    assert len(reads) == 2
    check(cfg, "--num-gpus", "2")  # whose workers read it themselves
    build_train_loader(cfg)
    assert len(reads) == 4


# ---- LazyConfigs ---------------------------------------------------------------------------------


def lazy(shapes, tmp_path, *overrides):
    return load_lazy_config(str(LAZY), [
        f"dataloader.train.dataset.names={shapes[0]}", f"dataloader.test.dataset.names={shapes[1]}",
        f"train.output_dir={tmp_path / 'output'}", "model.roi_heads.num_classes=6", *overrides,
    ])  # fmt: skip


def check_lazy(cfg, *arguments):
    return preflight.check_lazy(cfg, default_argument_parser().parse_args(arguments))


def test_a_right_lazy_config_passes(shapes, tmp_path):
    assert check_lazy(lazy(shapes, tmp_path)) == []
    (warning,) = check_lazy(lazy(shapes, tmp_path, "model.roi_heads.num_classes=80"))
    assert "model.roi_heads.num_classes is 80" in warning


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_iter=many", "train.max_iter must be a positive integer, got 'many'"),
        ("train.max_iter=null", "train.max_iter must be a positive integer, got None"),
        ("train.checkpointer.period=0", "train.checkpointer.period must be a positive integer"),
        ("train.amp.enabled=3", "train.amp.enabled must be True or False, got 3"),
        ("train.output_dir=null", "train.output_dir must be a non-empty string, got None"),
        ("train.init_checkpoint=null", "train.init_checkpoint must be a string, got None"),
        ("train=3", "train must be a group of keys, got 3"),
        ("dataloader.train.total_batch_size=a", "dataloader.train.total_batch_size must be an int"),
        ("dataloader.train.num_workers=-1", "dataloader.train.num_workers must be a non-negative"),
        ("model.roi_heads.num_classes=2", "model.roi_heads.num_classes is 2: set it to"),
        ("model.backbone.out_channels=-256", "model cannot be built: .*"),
        ("model.pixel_mean=3", "model cannot be built: .*"),
        ("optimizer.momentum=fast", "optimizer cannot be built: .*"),
        ("optimizer.lr=fast", "optimizer.lr must be a non-negative number, got 'fast'"),
        ("+dataloader.train.mapper.instance_mask_format=rle", "instance_mask_format must be 'pol"),
        ("dataloader.evaluator.dataset_name=none", "no data set is registered as 'none'"),
    ],
)
def test_a_wrong_value_of_a_lazy_config_is_named(shapes, tmp_path, override, message):
    with pytest.raises(ValueError, match=message) as error:
        check_lazy(lazy(shapes, tmp_path, override))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


def test_fewer_iterations_than_steps_of_the_schedule_are_named(tmp_path):
    cfg = load_lazy_config(str(CONFIGS / "FashionMNIST/resnet18_mabn_2.py"), ["train.max_iter=2"])
    with pytest.raises(
        ValueError, match="lr_multiplier with train.max_iter 2 cannot be built: "
    ) as e:
        check_lazy(cfg)
    assert "\n" not in str(e.value)
