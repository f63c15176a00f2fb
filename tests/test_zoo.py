"""
The norm "MABN" in Detectron2's own architectures: each config of its model zoo, its projects, and
backbones that no config of the zoo uses.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import detectron2.layers
import pytest
import torch
from detectron2 import model_zoo
from detectron2.layers import CycleBatchNormList, deform_conv, get_norm
from detectron2.layers.batch_norm import FrozenBatchNorm2d, LayerNorm
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

import mabn_d2
from mabn_d2 import CenConv2d, MABN2d, add_mabn_config
from mabn_d2.data import make_synthetic_coco
from mabn_d2.layers import CentralizedKernel
from mabn_d2.plugin import DETECTRON2_NORMS

from .helpers.models import (
    SIZE,
    build_for_inspection,
    set_keys,
    set_where_present,
    train_step,
)
from .helpers.zoo import (
    BACKBONES,
    OTHER_ARCHITECTURES,
    build_with,
    list_zoo,
    load,
    name_of,
    set_norm,
    shrink,
)

OTHER_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, nn.GroupNorm, LayerNorm)


# ---- what a model holds --------------------------------------------------------------------------


def norm_sites(model, norm_class):
    """Names of the norms of a class. A list with one norm per feature level counts as one."""
    lists = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    in_lists = {norm for norms in lists for norm in norms}
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, norm_class) and module not in in_lists)
        or (module in lists and all(isinstance(norm, norm_class) for norm in module))
    }


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, MABN2d)]


def centralized_convolutions(model):
    return [m for m in model.modules() if isinstance(m, (CenConv2d, CentralizedKernel))]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list_zoo() + OTHER_ARCHITECTURES + BACKBONES, ids=name_of)
def test_mabn_stands_where_bn_would_and_each_has_a_centralized_convolution(architecture):
    with_bn = build_for_inspection(set_norm(load(architecture), "BN"))
    model = build_for_inspection(set_norm(load(architecture), "MABN"))
    sites = norm_sites(model, MABN2d)
    assert sites
    assert sites == norm_sites(with_bn, (nn.BatchNorm2d, FrozenBatchNorm2d))
    assert not norm_sites(model, OTHER_NORMS)
    assert len(centralized_convolutions(model)) == len(sites)


# ---- what a training step does -------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """
    Records every convolution: id of its output -> the output and the kernel that made it.

    Deformable convolutions are computed by torchvision, which has their backward pass on the CPU.
    """
    recorded = {}

    def recording(function, output_dim=0):
        def call(x, kernel, *args, **kwargs):
            out = function(x, kernel, *args, **kwargs)
            recorded[id(out)] = out, kernel.detach().transpose(0, output_dim)
            return out

        return call

    def modulated(x, offset, mask, kernel, bias, stride, padding, dilation, *_):
        def compute(x, kernel):
            return deform_conv2d(x, offset, kernel, bias, stride, padding, dilation, mask)

        return recording(compute)(x, kernel)

    def deformable(x, offset, kernel, *geometry):
        return modulated(x, offset, None, kernel, None, *geometry)

    monkeypatch.setattr(F, "conv2d", recording(F.conv2d))
    monkeypatch.setattr(F, "conv_transpose2d", recording(F.conv_transpose2d, output_dim=1))
    monkeypatch.setattr(deform_conv, "deform_conv", deformable)
    monkeypatch.setattr(deform_conv, "modulated_deform_conv", modulated)
    return recorded


def mean_relative_to_largest(kernels):
    """For each output channel; 0 for a centralized kernel."""
    return kernels.mean((1, 2, 3)).abs() / kernels.abs().amax((1, 2, 3)).clamp(min=1e-30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        *[name for name in list_zoo() if name.endswith(".yaml")],
        "COCO-Detection/fcos_R_50_FPN_1x.py",
        "COCO-Detection/retinanet_R_50_FPN_1x.py",
        "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py",
        "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
        "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
        *OTHER_ARCHITECTURES,
    ],
    ids=name_of,
)
def test_in_training_every_mabn_is_given_the_output_of_a_zero_mean_kernel(architecture, kernels):
    model = build_with(shrink(load(architecture)), "MABN")
    fed_by = {}
    for name, module in model.named_modules():
        if isinstance(module, MABN2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: fed_by.update({name: kernels.get(id(args[0]))})
            )

    losses = train_step(model)

    assert losses and all(loss.isfinite() for loss in losses.values())
    norms = {name for name, module in model.named_modules() if isinstance(module, MABN2d)}
    assert set(fed_by) == norms
    assert [name for name, made_by in fed_by.items() if made_by is None] == []
    off_center = {name: mean_relative_to_largest(made_by[1]) for name, made_by in fed_by.items()}
    assert {name: mean.max() for name, mean in off_center.items() if mean.max() > 1e-6} == {}
    assert all(norm.second_moment.count > 0 for norm in norms_of(model))
    for convolution in centralized_convolutions(model):
        output_dim = 1 if isinstance(convolution, nn.ConvTranspose2d) else 0
        raw = convolution.weight.detach().transpose(0, output_dim)
        gradient = convolution.weight.grad.transpose(0, output_dim)
        assert mean_relative_to_largest(raw).max() > 1e-4
        assert gradient.isfinite().all()
        assert mean_relative_to_largest(gradient).max() < 1e-3


@pytest.mark.parametrize(
    "architecture",
    [
        "COCO-Detection/fcos_R_50_FPN_1x.py",
        "COCO-Detection/retinanet_R_50_FPN_1x.py",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    ],
)
def test_a_head_that_is_shared_over_feature_levels_keeps_statistics_of_each_level(architecture):
    model = build_with(shrink(load(architecture)), "MABN")
    train_step(model)
    lists = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    assert len(lists) == 2 * 4  # subnets, convolutions
    for norms in lists:
        assert [type(norm) for norm in norms] == 5 * [MABN2d]
        assert [norm.second_moment.count.item() for norm in norms] == 5 * [1]
        assert len({tuple(norm.running_var.tolist()) for norm in norms}) == 5
        assert norms.weight.grad.abs().sum() > 0


# ---- names and options of norms ------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTRON2_NORMS)
def test_a_norm_of_detectron2_is_still_built_by_detectron2(name):
    own = inspect.unwrap(detectron2.layers.get_norm)(name, 32)
    assert isinstance(own, nn.Module)
    assert type(get_norm(name, 32)) is type(own)


def test_what_is_not_a_name_of_a_norm_is_left_to_detectron2():
    assert get_norm("", 8) is None
    assert get_norm(None, 8) is None
    assert isinstance(get_norm(lambda channels: nn.GroupNorm(2, channels), 8), nn.GroupNorm)


def test_error_for_an_unknown_norm_quotes_it_and_lists_the_accepted_names():
    cfg = model_zoo.get_config("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    cfg.MODEL.FPN.NORM = "MABM"
    with pytest.raises(ValueError, match="'MABM'") as error:
        build_backbone(cfg)
    for name in ("MABN", *DETECTRON2_NORMS):
        assert re.search(rf"\b{name}\b", str(error.value))


def assert_every_norm_has(options, model):
    assert norms_of(model)
    for norm in norms_of(model):
        assert repr(norm) == repr(MABN2d(norm.num_features, affine=norm.affine, **options))


@pytest.mark.parametrize("build_from", [build_model, build_backbone])
def test_options_in_the_config_reach_every_norm(build_from):
    options = dict(
        momentum=0.1,
        eps=1e-3,
        buffer_size=8,
        warmup_iters=20,
        renorm_clip=2.0,
        renorm_start_iter=30,
    )
    cfg = shrink(load("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    add_mabn_config(cfg)
    set_keys(cfg.MODEL.MABN, **{key.upper(): value for key, value in options.items()})
    set_where_present(cfg, {"NORM": "MABN"})
    assert_every_norm_has(options, build_from(cfg))


@pytest.mark.parametrize("suffix", ["yaml", "py"])
def test_a_config_without_options_gets_the_constants_of_the_paper(suffix):
    model = build_with(shrink(load(f"COCO-Detection/retinanet_R_50_FPN_1x.{suffix}")), "MABN")
    constants = dict(
        momentum=0.02,
        eps=1e-5,
        buffer_size=16,
        warmup_iters=100,
        renorm_clip=5.0,
        renorm_start_iter=1000,
    )
    assert_every_norm_has(constants, model)


def test_options_of_one_model_do_not_leak_into_the_next():
    cfg = load("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    add_mabn_config(cfg)
    cfg.MODEL.MABN.BUFFER_SIZE = 3
    build_with(shrink(cfg), "MABN")
    assert get_norm("MABN", 8).second_moment.size == 16


# ---- installation --------------------------------------------------------------------------------


def replaced_in_detectron2():
    """What in Detectron2's modules is code of this package."""
    folder = str(Path(mabn_d2.__file__).parent)
    return {
        f"{module_name}.{name}"
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("detectron2")
        for name, value in vars(module).items()
        for function in [value.__init__ if inspect.isclass(value) else value]
        if inspect.isfunction(function) and function.__code__.co_filename.startswith(folder)
    }


def test_installing_again_changes_nothing():
    before = replaced_in_detectron2()
    functions = get_norm, build_model, detectron2.layers.Conv2d.__init__
    mabn_d2.install()
    assert replaced_in_detectron2() == before
    assert (get_norm, build_model, detectron2.layers.Conv2d.__init__) == functions


def test_uninstalling_gives_detectron2_its_own_functions_back():
    before = replaced_in_detectron2()
    assert {"detectron2.layers.get_norm", "detectron2.modeling.build_model"} <= before
    try:
        mabn_d2.uninstall()
        assert replaced_in_detectron2() == set()
        with pytest.raises(KeyError):
            get_norm("MABN", 8)
        mabn_d2.uninstall()
    finally:
        mabn_d2.install()
    assert replaced_in_detectron2() == before
    assert isinstance(get_norm("MABN", 8), MABN2d)


def run_python(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


def test_a_module_that_took_its_functions_from_detectron2_earlier_knows_the_norm(tmp_path):
    (tmp_path / "early.py").write_text(
        "from detectron2.config import get_cfg\n"
        "from detectron2.layers import get_norm as create\n"
        "from detectron2.modeling import build_backbone\n"
    )
    program = """
        import early
        import mabn_d2

        assert isinstance(early.create("MABN", 8), mabn_d2.MABN2d)
        cfg = early.get_cfg()
        cfg.MODEL.RESNETS.NORM = "MABN"
        backbone = early.build_backbone(cfg)
        assert sum(isinstance(m, mabn_d2.CenConv2d) for m in backbone.modules()) == 43
    """
    run_python("-c", textwrap.dedent(program), cwd=tmp_path)


STOCK_SCRIPT = """
    from detectron2.config import get_cfg
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer, default_setup, launch
    from detectron2.engine import default_argument_parser


    def setup(args):
        cfg = get_cfg()
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        cfg.freeze()
        default_setup(cfg, args)
        return cfg


    def main(args):
        annotations = "shapes/annotations/instances_train.json"
        register_coco_instances("tiny", {}, annotations, "shapes/train")
        trainer = DefaultTrainer(setup(args))
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


    if __name__ == "__main__":
        args = default_argument_parser().parse_args()
        launch(main, args.num_gpus, args=(args,))
"""


def test_a_training_script_of_detectron2_needs_the_import_alone(tmp_path):
    make_synthetic_coco(tmp_path, train=4, val=1, size=SIZE)
    (tmp_path / "train_net.py").write_text("import mabn_d2\n" + textwrap.dedent(STOCK_SCRIPT))
    cfg = shrink(load("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.NORM = "MABN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.DATASETS.TRAIN = ("tiny",)
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    set_keys(cfg.INPUT, MIN_SIZE_TRAIN=(SIZE,))
    set_keys(cfg.SOLVER, IMS_PER_BATCH=2, MAX_ITER=3, STEPS=(), WARMUP_ITERS=0, BASE_LR=1e-3)
    (tmp_path / "config.yaml").write_text(cfg.dump())

    run_python("train_net.py", "--config-file", "config.yaml", cwd=tmp_path)

    metrics = [json.loads(line) for line in (tmp_path / "output/metrics.json").open()]
    assert math.isfinite(metrics[-1]["total_loss"])
    state = torch.load(tmp_path / "output/model_final.pth")["model"]
    counts = [value for key, value in state.items() if key.endswith("second_moment.count")]
    assert len(counts) == 53
    assert all(count == 3 for count in counts)
