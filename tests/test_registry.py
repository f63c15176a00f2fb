"""A norm of a user's own: one class, one line that registers it, and all that follows from that."""

import functools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.engine import DefaultTrainer
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from mabn_d2 import NORM_REGISTRY, add_mabn_config
from mabn_d2.layers.options import IterationCount, NonNegativeNumber, checked
from mabn_d2.plugin import check_norm_name, load_config, norm_options

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml"


class Foo(nn.Module):
    """Of no type that Detectron2 knows."""

    @checked
    def __init__(
        self,
        num_features,
        strength: NonNegativeNumber = 0.5,
        delay: IterationCount = 10,
        affine=True,
    ):
        super().__init__()
        self.num_features, self.strength, self.delay = num_features, strength, delay
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        return x * self.strength


@pytest.fixture
def registry():
    """What a test registers is forgotten."""
    before = dict(NORM_REGISTRY._obj_map)
    yield NORM_REGISTRY
    NORM_REGISTRY._obj_map.clear()
    NORM_REGISTRY._obj_map.update(before)


@pytest.fixture
def foo(registry):
    registry.register(Foo)


def write(folder, text):
    file = folder / "config.yaml"
    file.write_text(f'_BASE_: "{SMALL}"\n' + textwrap.dedent(text))
    return str(file)


def foos(model):
    found = [module for module in model.modules() if isinstance(module, Foo)]
    assert found
    return found


def retinanet_head(norm):
    cfg = get_cfg()
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    shapes = 3 * [ShapeSpec(channels=8)]
    anchors = build_anchor_generator(cfg, shapes)
    return RetinaNetHead(
        input_shape=shapes,
        num_classes=2,
        num_anchors=anchors.num_anchors[0],
        conv_dims=[8, 8],
        norm=norm,
    )


# ---- the way from a config into the norm ---------------------------------------------------------


def test_its_options_are_set_in_yaml_and_on_the_command_line(foo, tmp_path):
    file = write(tmp_path, "MODEL: {RESNETS: {NORM: Foo}, Foo: {STRENGTH: 2, DELAY: 20}}")
    cfg = load_config(file, ["MODEL.FPN.NORM", "Foo", "MODEL.Foo.DELAY", "30"])
    norms = foos(build_backbone(cfg))
    assert len(norms) == 20 + 8  # those of a ResNet-18, those of FPN
    assert {(norm.strength, norm.delay) for norm in norms} == {(2.0, 30)}


def test_without_options_in_the_config_it_has_its_defaults(foo):
    cfg = get_cfg()
    assert cfg.MODEL.Foo == {"STRENGTH": 0.5, "DELAY": 10}
    del cfg.MODEL["Foo"]
    cfg.MODEL.RESNETS.NORM = "Foo"
    assert {(norm.strength, norm.delay) for norm in foos(build_backbone(cfg))} == {(0.5, 10)}


@pytest.mark.parametrize("norm", ["Foo", functools.partial(Foo, strength=0.5)])
def test_it_is_a_norm_of_a_lazy_config(foo, norm):
    config = LazyCall(BasicStem)(in_channels=3, out_channels=4, norm=norm)
    (norm,) = foos(instantiate(config))
    assert (norm.num_features, norm.strength, norm.delay) == (4, 0.5, 10)


@pytest.mark.parametrize("norm", ["Foo", functools.partial(Foo, delay=10)])
def test_a_head_over_feature_levels_has_one_for_each_level(foo, norm):
    head = retinanet_head(norm)
    lists = [module for module in head.modules() if isinstance(module, CycleBatchNormList)]
    assert [len(norms) for norms in lists] == 2 * 2 * [3]  # subnets, convolutions, levels
    assert all(isinstance(norm, Foo) for norms in lists for norm in norms)
    assert all(not list(norm.parameters()) for norm in foos(head))
    assert all(norms.weight.shape == (8,) for norms in lists)


# ---- ranges --------------------------------------------------------------------------------------

WRONG = [
    ("strength", -1, "a non-negative number, got -1"),
    ("strength", True, "a non-negative number, got True"),
    ("strength", "large", "a non-negative number, got 'large'"),
    ("delay", 1.5, "a non-negative integer, got 1.5"),
    ("delay", "16x", "a non-negative integer, got '16x'"),
    ("delay", None, "a non-negative integer, got None"),
    ("delay", [1, 2], r"a non-negative integer, got \[1, 2\]"),
]


@pytest.mark.parametrize("option, value, message", WRONG)
@pytest.mark.parametrize("where", ["file", "command line", "python", "lazy"])
def test_what_it_does_not_accept_is_refused_in_one_line_by_its_key(
    foo, tmp_path, where, option, value, message
):
    key = f"MODEL.Foo.{option.upper()}"
    with pytest.raises(ValueError) as error:
        if where == "file":
            quoted = value if isinstance(value, (list, int, float)) else repr(value)
            quoted = "null" if value is None else quoted
            load_config(write(tmp_path, f"MODEL: {{Foo: {{{option.upper()}: {quoted}}}}}"))
        elif where == "command line":
            load_config(str(SMALL), [key, str(value)])
        elif where == "python":
            cfg = get_cfg()
            cfg.MODEL.Foo[option.upper()] = value
            norm_options(cfg)
        else:
            key = f"model.stem.norm: {option}"
            check_norm_name(functools.partial(Foo, **{option: value}), "model.stem.norm")
    assert re.fullmatch(f"{re.escape(key)} must be {message}(.0)?", str(error.value))


def test_an_option_without_a_range_keeps_the_type_of_its_default(registry):
    registry.register(lambda num_features, flag=False, factor=1.0: None, name="Plain")
    assert load_config(str(SMALL), ["MODEL.Plain.FACTOR", "3"]).MODEL.Plain.FACTOR == 3.0
    with pytest.raises(ValueError, match=r"bool.* vs\. .*int.*MODEL\.Plain\.FLAG"):
        load_config(str(SMALL), ["MODEL.Plain.FLAG", "3"])


# ---- registration --------------------------------------------------------------------------------


def test_it_can_be_registered_by_a_decorator(registry):
    @registry.register
    class Bar(Foo):
        pass

    @registry.register(name="Baz")
    class Other(Foo):
        pass

    assert type(get_norm("Bar", 4)) is Bar and type(get_norm("Baz", 4)) is Other


@pytest.mark.parametrize("name", ["MABN", "BN", "SyncBN", "RESNETS", "NORM_BATCH_SIZE", "WEIGHTS"])
def test_a_name_that_is_taken_is_refused(registry, name):
    with pytest.raises(ValueError, match=f"{name!r}"):
        registry.register(Foo, name=name)
    assert name in ("MABN",) or name not in registry


def test_one_that_is_registered_later_comes_in_by_adding_the_options_again(registry):
    cfg = get_cfg()
    cfg.MODEL.MABN.MOMENTUM = 0.1
    registry.register(Foo)
    assert "Foo" not in cfg.MODEL
    add_mabn_config(cfg)
    assert cfg.MODEL.Foo == {"STRENGTH": 0.5, "DELAY": 10} and cfg.MODEL.MABN.MOMENTUM == 0.1


def test_options_of_something_else_under_its_name_are_not_mixed_with_its_own(foo):
    cfg = get_cfg()
    cfg.MODEL.Foo = type(cfg)({"HEADS": 8})
    with pytest.raises(ValueError, match=r"MODEL\.Foo .* is not for the options of the norm Foo"):
        add_mabn_config(cfg)


def test_its_iterations_are_scaled_to_the_number_of_workers(foo):
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    scaled = DefaultTrainer.auto_scale_workers(cfg, 2)
    assert scaled.MODEL.Foo == {"STRENGTH": 0.5, "DELAY": 40} and cfg.MODEL.Foo.DELAY == 10


# ---- weight decay --------------------------------------------------------------------------------


def decays(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = get_default_optimizer_params(model, weight_decay=1.0, weight_decay_norm=0.1)
    return {names[p]: group["weight_decay"] for group in groups for p in group["params"]}


def test_its_parameters_get_the_weight_decay_of_norms(foo):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), get_norm("Foo", 4), Foo(4))
    assert decays(model) == {
        "0.weight": 1.0, "0.bias": 1.0,
        "1.weight": 0.1, "1.bias": 0.1, "2.weight": 0.1, "2.bias": 0.1,
    }  # fmt: skip


def test_what_a_function_makes_decays_as_a_norm_and_its_type_elsewhere_does_not(registry):
    registry.register(
        lambda num_features: nn.Conv2d(num_features, num_features, 1), name="OneByOne"
    )
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), get_norm("OneByOne", 4))
    assert decays(model) == {"0.weight": 1.0, "1.weight": 0.1, "1.bias": 0.1}


# ---- a stock script ------------------------------------------------------------------------------


@pytest.mark.parametrize("imports", [
    "import mabn_d2\nfrom detectron2.config import get_cfg",
    "from detectron2.config import get_cfg\nimport mabn_d2",
    "from detectron2 import model_zoo\nfrom detectron2.config.config import get_cfg\nimport mabn_d2",
])  # fmt: skip
def test_a_stock_script_reads_our_configs_after_the_import(imports, tmp_path):
    program = f"""
        cfg = get_cfg()
        cfg.merge_from_file({str(SMALL).replace("mabn.yaml", "brn.yaml")!r})
        cfg.merge_from_list(["MODEL.BRN.R_MAX", "2"])
        from detectron2.modeling import build_backbone
        norms = [m for m in build_backbone(cfg).modules() if isinstance(m, mabn_d2.layers.BRN2d)]
        assert len(norms) == 28 and norms[0].r_max == 2 and norms[0].r_max_iters == (100, 800)
        mabn_d2.uninstall()
        import detectron2.config
        assert "MABN" not in detectron2.config.get_cfg().MODEL
    """
    done = subprocess.run(
        [sys.executable, "-c", imports + textwrap.dedent(program)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
