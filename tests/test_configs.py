"""The experiments in configs/: their files, and what a run of each of them trains."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import get_norm
from detectron2.solver import LRMultiplier
from detectron2.utils.events import EventStorage
from torch import nn

from mabn_d2 import add_mabn_config
from mabn_d2.data import register_shapes
from mabn_d2.engine import Trainer
from mabn_d2.plugin import DETECTRON2_NORMS, NORM_REGISTRY, check_norm_names

from .helpers import CONFIGS
from .helpers.models import build, build_for_inspection, random_inputs, set_keys, train_step

ELSEWHERE = ("ImageNet", "FashionMNIST", "study")  # have tests of their own


def list_files(pattern):
    paths = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.rglob(pattern))]
    return [str(path) for path in paths if path.parts[0] not in ELSEWHERE]


YAML_FILES = list_files("*.yaml")
EXPERIMENTS = [name for name in YAML_FILES if "Base-" not in name]
LAZY_FILES = list_files("*.py")
LAZY_EXPERIMENTS = [name for name in LAZY_FILES if not name.startswith("common/")]
PAPER = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_mabn"
SMALL = "quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn"


def load(name):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def leaves(node, prefix=""):
    """Key with dots -> value, of nested dictionaries."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def differences(cfg, other):
    """Keys in which two merged configs differ; those that `other` lacks do not count."""
    cfg, other = leaves(cfg), leaves(other)
    return {key for key in other if cfg[key] != other[key]}


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", YAML_FILES)
def test_a_config_has_known_keys_norms_and_data_sets(name):
    register_shapes()
    cfg = load(name)
    check_norm_names(cfg)
    assert set(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST) <= set(DatasetCatalog.list())


@pytest.mark.parametrize("name", YAML_FILES)
def test_a_config_states_only_its_difference_from_an_existing_base(name):
    path = CONFIGS / name
    content = yaml.unsafe_load(path.read_text())
    base = content.pop("_BASE_", None)
    assert base or path.name.startswith("Base-")
    if base:
        inherited = leaves(CfgNode.load_yaml_with_base(str(path.parent / base), allow_unsafe=True))
        stated = leaves(content)
        assert [key for key in stated if key in inherited and inherited[key] == stated[key]] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_name_of_an_experiment_says_what_it_is(name):
    cfg = load(name)
    words = re.split("[_/.]", name)
    (norm,) = norm_names(cfg) - ({""} if "frozenbn" in words else set())
    assert norm.lower() in words
    assert words[words.index("R" if "R" in words else "X") + 1] == str(cfg.MODEL.RESNETS.DEPTH)
    assert ("scratch" in words or "shapes" in words) == (cfg.MODEL.WEIGHTS == "")
    if "shapes" in words:  # `make demo` continues what it finds in the output folder
        assert cfg.OUTPUT_DIR == f"./output/{Path(name).stem}"
    for schedule in re.findall(r"_(\d+)x_", name):  # 1x are 90k iterations of 16 images
        assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == int(schedule) * 90000 * 16


# ---- experiments that are compared with one another ----------------------------------------------

NORMS = {f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
START = {"MODEL.WEIGHTS"}
# What the paper has otherwise than Detectron2.
SAMPLING = {f"MODEL.{head}.POOLER_SAMPLING_RATIO" for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")}
FREEZE = {"MODEL.BACKBONE.FREEZE_AT"}
# Which Detectron2's own configs have as the layer has it.
BUFFER = {"MODEL.MABN.BUFFER_SIZE"}
PAPERS = FREEZE | START | NORMS | {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"}


def norm_names(cfg):
    """The norms of the parts that an experiment has."""
    return {norm for norm, _ in expected_norms(cfg).values()}


def test_the_papers_experiments_differ_in_norm_and_start_alone():
    norms_and_starts = {}
    for name in ("scratch_mask_rcnn_R_50_FPN_2x_bn", "scratch_mask_rcnn_R_50_FPN_2x_brn",
                 "scratch_mask_rcnn_R_50_FPN_2x_syncbn", "scratch_mask_rcnn_R_50_FPN_2x_mabn",
                 "mask_rcnn_R_50_FPN_2x_syncbn", "mask_rcnn_R_50_FPN_2x_mabn"):  # fmt: skip
        cfg = load(f"COCO-InstanceSegmentation/{name}.yaml")
        assert differences(cfg, load(PAPER + ".yaml")) <= NORMS | START
        (norm,) = norm_names(cfg)
        norms_and_starts[name] = (norm, bool(cfg.MODEL.WEIGHTS))
    assert norms_and_starts == {
        "scratch_mask_rcnn_R_50_FPN_2x_bn": ("BN", False),
        "scratch_mask_rcnn_R_50_FPN_2x_brn": ("BRN", False),
        "scratch_mask_rcnn_R_50_FPN_2x_syncbn": ("SyncBN", False),
        "scratch_mask_rcnn_R_50_FPN_2x_mabn": ("MABN", False),
        "mask_rcnn_R_50_FPN_2x_syncbn": ("SyncBN", True),
        "mask_rcnn_R_50_FPN_2x_mabn": ("MABN", True),
    }


@pytest.mark.parametrize("mabn", [PAPER, SMALL])
def test_the_rivals_of_mabn_differ_from_it_in_the_norm_alone(mabn):
    rivals = [name for name in EXPERIMENTS if re.fullmatch(f"{mabn[:-4]}(?!mabn).*", name[:-5])]
    assert len(rivals) >= 5
    for rival in rivals:
        (norm,) = norm_names(load(rival))
        differ = differences(load(rival), load(mabn + ".yaml")) - {"OUTPUT_DIR"}
        assert {key for key in differ if not key.startswith(f"MODEL.{norm}.")} == NORMS


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "_without_df" in name])
def test_mbn_is_compared_with_and_without_double_forward(name):
    with_df = name.replace("_without_df", "")
    assert load(with_df).MODEL.MBN.DOUBLE_FORWARD is True
    assert load(name).MODEL.MBN.DOUBLE_FORWARD is False
    assert differences(load(name), load(with_df)) - {"OUTPUT_DIR"} == {"MODEL.MBN.DOUBLE_FORWARD"}


@pytest.mark.parametrize(
    "name, zoo_name, differ",
    [
        ("InstanceSegmentation/mask_rcnn_R_50_FPN_2x_frozenbn", "mask_rcnn_R_50_FPN_1x", set()),
        ("InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn", "../Misc/mask_rcnn_R_50_FPN_3x_gn", FREEZE),
        ("InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_mabn", "mask_rcnn_R_50_FPN_1x", PAPERS),
        ("InstanceSegmentation/scratch_mask_rcnn_X_101_32x8d_FPN_3x_mabn",
         "mask_rcnn_X_101_32x8d_FPN_3x", PAPERS | {"MODEL.PIXEL_STD"}),
        ("InstanceSegmentation/scratch_cascade_mask_rcnn_R_50_FPN_2x_mabn",
         "../Misc/cascade_mask_rcnn_R_50_FPN_1x", PAPERS),
        ("Detection/scratch_faster_rcnn_R_50_FPN_2x_mabn", "faster_rcnn_R_50_FPN_1x", PAPERS),
        ("Detection/scratch_retinanet_R_50_FPN_2x_mabn", "retinanet_R_50_FPN_1x",
         FREEZE | START | NORMS | {"MODEL.RETINANET.NORM"}),
        ("Keypoints/scratch_keypoint_rcnn_R_50_FPN_2x_mabn", "keypoint_rcnn_R_50_FPN_1x", PAPERS),
        ("PanopticSegmentation/scratch_panoptic_fpn_R_50_2x_mabn", "panoptic_fpn_R_50_1x",
         PAPERS | {"MODEL.SEM_SEG_HEAD.NORM"}),
    ],
)  # fmt: skip
def test_an_architecture_is_detectron2s_but_for_the_papers_changes(name, zoo_name, differ):
    folder = f"COCO-{name.split('/')[0]}"
    zoo = model_zoo.get_config(os.path.normpath(f"{folder}/{zoo_name}.yaml"))
    zoo.MODEL.DEVICE = "cpu"
    found = {key for key in differences(load(f"COCO-{name}.yaml"), zoo) if key.startswith("MODEL.")}
    if not zoo.MODEL.MASK_ON:
        found = {key for key in found if not key.startswith("MODEL.ROI_MASK_HEAD.")}
    assert found - SAMPLING - BUFFER <= differ


# ---- models --------------------------------------------------------------------------------------

NORM_TYPES = {
    type(get_norm(name, 32)) for name in [*DETECTRON2_NORMS, *(name for name, _ in NORM_REGISTRY)]
}
NORMS_OF_A_RESNET = {
    18: 1 + 16 + 3,
    26: 1 + 3 * 8 + 4,
    50: 1 + 3 * 16 + 4,
    101: 1 + 3 * 33 + 4,
}  # stem, blocks, shortcuts


def expected_norms(cfg):
    """Prefix of a part's modules -> the name of its norm, and how many there are."""
    model = cfg.MODEL
    expected = {
        "backbone.bottom_up.": (model.RESNETS.NORM, NORMS_OF_A_RESNET[model.RESNETS.DEPTH]),
        "backbone.fpn_": (model.FPN.NORM, 2 * len(model.FPN.IN_FEATURES)),
    }
    if model.META_ARCHITECTURE == "RetinaNet":  # two subnets, statistics for each level
        number = 2 * model.RETINANET.NUM_CONVS * len(model.RETINANET.IN_FEATURES)
        return {**expected, "head.": (model.RETINANET.NORM, number)}
    box_heads = 3 if model.ROI_HEADS.NAME == "CascadeROIHeads" else 1
    box_head = model.ROI_BOX_HEAD
    expected["roi_heads.box_head."] = (box_head.NORM, box_heads * box_head.NUM_CONV)
    if model.MASK_ON:
        expected["roi_heads.mask_head."] = (model.ROI_MASK_HEAD.NORM, model.ROI_MASK_HEAD.NUM_CONV)
    if model.META_ARCHITECTURE == "PanopticFPN":  # one for each time that a level is enlarged to p2
        expected["sem_seg_head."] = (model.SEM_SEG_HEAD.NORM, 1 + 1 + 2 + 3)
    return expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_part_of_a_model_has_the_norm_that_the_config_says_and_no_other(name):
    expected = expected_norms(load(name))
    found = Counter()
    for module_name, module in build_for_inspection(load(name)).named_modules():
        if type(module) in NORM_TYPES:
            part = [part for part in expected if module_name.startswith(part)] or [module_name]
            found[part[0], type(module)] += 1
    assert found == {
        (part, type(get_norm(norm, 32))): number
        for part, (norm, number) in expected.items()
        if norm and number
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_frozen_but_in_the_experiment_with_frozen_norms(name):
    model = build_for_inspection(load(name))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == ("frozenbn" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "syncbn" not in name])
def test_an_experiment_takes_a_training_step(name):
    cfg = load(name)
    set_keys(cfg.MODEL.RPN, POST_NMS_TOPK_TRAIN=16)
    set_keys(cfg.MODEL.ROI_HEADS, BATCH_SIZE_PER_IMAGE=8)
    model = build(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    losses = train_step(model, classes=(0, min(2, cfg.MODEL.ROI_HEADS.NUM_CLASSES - 1)))
    optimizer.step()

    expected = {"RetinaNet": {"loss_cls", "loss_box_reg"}}.get(
        cfg.MODEL.META_ARCHITECTURE, {"loss_rpn_cls", "loss_rpn_loc"}
    )
    expected |= {"loss_mask"} if cfg.MODEL.MASK_ON else set()
    expected |= {"loss_keypoint"} if cfg.MODEL.KEYPOINT_ON else set()
    expected |= {"loss_sem_seg"} if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN" else set()
    assert expected <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    for (parameter_name, parameter), old in zip(model.named_parameters(), before):
        assert parameter.isfinite().all(), parameter_name
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert not torch.equal(parameter, old) or not parameter.grad.any(), parameter_name


# ---- lazy configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAZY_FILES)
def test_a_lazy_config_loads(name):
    assert len(LazyConfig.load(str(CONFIGS / name))) > 0


def load_twins(name):
    """A lazy experiment and the YAML experiment of the same name."""
    return LazyConfig.load(str(CONFIGS / name)), load(name.replace(".py", ".yaml"))


def settings(thing):
    """The plain attributes of an object of Detectron2 or PyTorch, and of the objects it holds."""
    if isinstance(thing, (list, tuple)):
        return [settings(value) for value in thing]
    if isinstance(thing, dict):
        # A loss weight of 1 need not be written; the losses themselves are compared.
        kept = [key for key in thing if key != "loss_weight" and not str(key).startswith("_")]
        return {key: settings(thing[key]) for key in kept}
    if isinstance(thing, nn.Module) or torch.is_tensor(thing):
        return None  # compared on its own
    if type(thing).__module__.startswith(("detectron2.", "mabn_d2.")):
        return type(thing), settings(vars(thing))
    return thing


def optimizer_options(model, optimizer):
    """Name of a parameter -> its options."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    options = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = ("lr", "weight_decay", "momentum", "dampening", "nesterov")
            options[names[parameter]] = {key: group[key] for key in kept}
    return options


@pytest.mark.parametrize("name", LAZY_EXPERIMENTS)
def test_a_lazy_config_builds_the_model_of_its_yaml_twin(name):
    lazy, cfg = load_twins(name)
    lazy_model, model = build(lazy.model), build(cfg)
    assert {key: value.shape for key, value in lazy_model.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    for (name_a, a), (name_b, b) in zip(lazy_model.named_modules(), model.named_modules()):
        assert (name_a, type(a)) == (name_b, type(b))
        assert settings(vars(a)) == settings(vars(b)), name_a
    for statistic in ("pixel_mean", "pixel_std"):
        assert torch.equal(getattr(lazy_model, statistic), getattr(model, statistic))
    frozen = [[p.requires_grad for p in m.parameters()] for m in (lazy_model, model)]
    assert frozen[0] == frozen[1]
    lazy_model.load_state_dict(model.state_dict())
    inputs = random_inputs()
    losses = []
    for each in (lazy_model, model):
        torch.manual_seed(0)
        np.random.seed(0)
        with EventStorage(), torch.no_grad():
            losses.append(each.train()(inputs))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", LAZY_EXPERIMENTS)
def test_a_lazy_config_trains_as_its_yaml_twin(name):
    lazy, cfg = load_twins(name)
    model = build(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    lazy_optimizer = instantiate(lazy.optimizer)
    assert type(lazy_optimizer) is type(optimizer)
    assert optimizer_options(model, lazy_optimizer) == optimizer_options(model, optimizer)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    schedulers = [
        LRMultiplier(lazy_optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter),
        Trainer.build_lr_scheduler(cfg, optimizer),
    ]
    changes = [0, cfg.SOLVER.WARMUP_ITERS, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER]
    for iteration in {i + shift for i in changes for shift in (-1, 0, 1, 100)}:
        if 0 <= iteration < cfg.SOLVER.MAX_ITER:
            rates = []
            for scheduler in schedulers:
                scheduler.last_epoch = iteration
                rates.append(scheduler.get_lr())
            assert sorted(rates[0]) == pytest.approx(sorted(rates[1]), rel=1e-12), iteration


@pytest.mark.parametrize("name", LAZY_EXPERIMENTS)
def test_a_lazy_config_reads_the_data_of_its_yaml_twin(name):
    lazy, cfg = load_twins(name)
    data = lazy.dataloader
    assert data.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert data.train.num_workers == data.test.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert (data.train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (data.test.dataset.names,) == cfg.DATASETS.TEST
    assert settings(instantiate(data.train.mapper)) == settings(DatasetMapper(cfg, is_train=True))
    lazy_mapper, mapper = instantiate(data.test.mapper), DatasetMapper(cfg, is_train=False)
    assert lazy_mapper.image_format == mapper.image_format
    for height, width in [(480, 640), (1000, 300), (800, 800)]:
        image = np.zeros((height, width, 3), np.uint8)
        assert len(mapper.augmentations.augs) == len(lazy_mapper.augmentations.augs) == 1
        transforms = [m.augmentations.augs[0].get_transform(image) for m in (lazy_mapper, mapper)]
        assert settings(transforms[0]) == settings(transforms[1])
    assert data.train.dataset.get("filter_empty", True) == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert data.evaluator.dataset_name == cfg.DATASETS.TEST[0]
