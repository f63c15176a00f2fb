"""Tools of other packages that handle BN are right about our norms, or refuse them by name."""

import copy
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, hooks
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel
from torchvision.models._utils import IntermediateLayerGetter

import mabn_d2
from mabn_d2.engine import update_norm_statistics
from mabn_d2.layers import BRN2d, CenConv2d, GhostBatchNorm2d, MABN2d, MBN2d

from .helpers import ROOT
from .helpers.norms import assert_same_state, state

NORMS = {"MABN": MABN2d, "BRN": BRN2d, "MBN": MBN2d, "ghost": GhostBatchNorm2d}


def trained(norm, conv=nn.Conv2d):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU())
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8) * 3).square().sum().backward()
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    return model


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8))


def refused(tool, model, name):
    """Whether the tool names the norm in one line and changes nothing."""
    before = state(model)
    with pytest.raises(ValueError, match=name) as error:
        tool()
    assert_same_state(before, state(model))
    return "\n" not in str(error.value)


@pytest.mark.parametrize("norm", NORMS.values())
def test_swas_update_bn_names_the_norm_and_what_does_it(norm):
    model = trained(norm)
    name = rf"update_bn does not update 1 \({norm.__name__}\): .*population_statistics"
    assert refused(lambda: swa_utils.update_bn([torch.ones(2, 3, 8, 8)], model), model, name)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert refused(lambda: swa_utils.update_bn([], averaged), averaged, "module.1")
    update_norm_statistics(averaged, [torch.ones(2, 3, 8, 8)], 1)  # what the message says


def test_swas_update_bn_updates_bn():
    model = trained(nn.BatchNorm2d)
    x = torch.randn(8, 3, 8, 8)
    swa_utils.update_bn([x], model)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)).detach())


@pytest.mark.parametrize("norm", ["BRN", "MBN", "ghost"])
def test_a_conversion_to_syncbn_does_not_swallow_a_norm(norm):
    model = trained(NORMS[norm])
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    name = rf"would replace 1 \({NORMS[norm].__name__}\)"
    assert refused(lambda: convert(nn.Sequential(model[0], model[1])), model, name)
    with pytest.raises(ValueError, match=rf"would replace {NORMS[norm].__name__}: "):
        convert(model[1])


def test_a_conversion_to_syncbn_converts_bn_and_leaves_mabn():
    model = nn.Sequential(*trained(MABN2d), nn.BatchNorm2d(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in converted][1::2] == [MABN2d, nn.SyncBatchNorm]


@pytest.mark.parametrize("norm", NORMS.values())
def test_fvcores_precise_bn_names_the_norm(norm):
    model = trained(norm)
    batches = [torch.ones(2, 3, 8, 8)]
    name = rf"\(update_bn_stats, PreciseBN\) does not know 1 \({norm.__name__}\)"
    assert refused(lambda: update_bn_stats(model, batches, 1), model, name)
    assert refused(lambda: hooks.PreciseBN(1, model, batches, 1), model, name)
    model.requires_grad_(False)
    if norm is not GhostBatchNorm2d:  # BN's rule: it is not frozen by its parameters
        update_bn_stats(nn.Sequential(model, nn.BatchNorm2d(4)), batches, 1)


def test_detectron2s_trainer_does_not_pass_over_a_norm_in_precise_bn(tmp_path):
    trainer = object.__new__(DefaultTrainer)
    trainer.cfg = get_cfg()
    trainer.cfg.TEST.PRECISE_BN.ENABLED = True
    trainer._trainer = type("Trainer", (), {"model": trained(MABN2d)})
    with pytest.raises(ValueError, match=r"does not know 1 \(MABN2d\)"):
        trainer.build_hooks()


@pytest.mark.parametrize("norm", NORMS.values())
def test_a_conversion_to_frozenbn_is_the_evaluation_of_the_norm(norm):
    model = trained(norm)
    expected = outputs(copy.deepcopy(model).eval())
    if norm is MABN2d:  # which is none of BN, so it is frozen as itself
        name = r"does not freeze 1 \(MABN2d\): call requires_grad_\(False\)"
        assert refused(lambda: FrozenBatchNorm2d.convert_frozen_batchnorm(model), model, name)
        model.requires_grad_(False)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert isinstance(frozen[1], MABN2d if norm is MABN2d else FrozenBatchNorm2d)
    torch.testing.assert_close(outputs(frozen), expected)


@pytest.mark.parametrize("norm", NORMS.values())
def test_pytorchs_fusion_is_the_evaluation_or_is_refused_for_a_centralized_kernel(norm):
    model = trained(norm).eval()
    fused = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(nn.Sequential(fused, model[2])(torch.ones(2, 3, 8, 8)),
                               model(torch.ones(2, 3, 8, 8)))  # fmt: skip
    model = trained(norm, CenConv2d).eval()
    name = "into the raw kernel of CenConv2d: use mabn_d2.surgery.fold"
    assert refused(lambda: fuse_conv_bn_eval(model[0], model[1]), model, name)


@pytest.mark.parametrize("conv", [nn.Conv2d, CenConv2d])
@pytest.mark.parametrize("norm", NORMS.values())
def test_quantizations_fusion_names_what_it_does_not_know(norm, conv):
    model = trained(norm, conv).eval()
    with pytest.raises((NotImplementedError, AssertionError), match=norm.__name__):
        fuse_modules(model, [["0", "1", "2"]])


def test_a_parametrization_of_a_centralized_convolution_is_centralized():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    convolution = CenConv2d(3, 4, 3, bias=False)
    x = torch.randn(2, 3, 6, 6)
    expected = 2 * convolution(x)
    parametrize.register_parametrization(convolution, "weight", Double())
    torch.testing.assert_close(convolution(x), expected)
    convolution(x).sum().backward()
    assert convolution.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("norm", NORMS.values())
def test_tools_that_take_modules_as_they_are_do(norm):
    model = trained(norm, CenConv2d).eval()
    layers = IntermediateLayerGetter(model, {"1": "out"})
    x = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(layers(x)["out"].relu(), model(x))
    flops = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_module()
    assert flops["0"] > 0 and flops["1"] > 0
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(x), model(x))


def test_without_the_package_installed_the_tools_are_their_own():
    mabn_d2.uninstall()
    try:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(trained(BRN2d))
        assert type(converted[1]) is nn.SyncBatchNorm
        swa_utils.update_bn([torch.ones(2, 3, 8, 8)], trained(MABN2d))
    finally:
        mabn_d2.install()
    with pytest.raises(ValueError, match="update_bn does not update"):
        swa_utils.update_bn([], trained(MABN2d))


def test_pytorchs_tools_name_our_norms_without_detectron2_and_where_they_were_imported_before():
    code = (
        "import sys; sys.modules['detectron2'] = sys.modules['fvcore'] = None\n"
        "from torch.optim.swa_utils import update_bn\n"
        "import mabn_d2\n"
        "update_bn([], mabn_d2.MABN2d(3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "ValueError: update_bn does not update MABN2d: " in done.stderr.splitlines()[-1]


def test_timms_tools_name_our_norms():
    timm = pytest.importorskip("timm")
    mabn_d2.install()  # timm was imported later
    for norm in (BRN2d, MBN2d, GhostBatchNorm2d):
        model = trained(norm)
        for convert in (timm.layers.convert_sync_batchnorm, timm.layers.convert_splitbn_model):
            assert refused(lambda: convert(model), model, norm.__name__)
        expected = outputs(copy.deepcopy(model).eval())
        torch.testing.assert_close(outputs(timm.layers.freeze_batch_norm_2d(model)), expected)
    model = trained(MABN2d)
    assert refused(lambda: timm.layers.freeze_batch_norm_2d(model), model, "does not freeze 1")
    model.requires_grad_(False)
    before = state(timm.layers.freeze_batch_norm_2d(model))
    outputs(model)
    assert_same_state(before, state(model))
    average = timm.utils.ModelEmaV2(model.eval(), decay=0.5)
    average.update(model)
    torch.testing.assert_close(outputs(average.module), outputs(model))
