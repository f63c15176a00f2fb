"""`convert` and the exact import of BN."""

import copy
import logging

import detectron2.layers as d2
import pytest
import torch
import torchvision
from detectron2.layers.batch_norm import FrozenBatchNorm2d
from torch import nn

import mabn_d2
from mabn_d2 import BRN2d, CenConv2d, MABN2d, MBN2d
from mabn_d2.layers import CenConvTranspose2d, centralize_kernel
from mabn_d2.surgery import convert, convertible_sites, find_norm_sites, fold, import_batch_norm
from mabn_d2.surgery.sites import is_norm

from .helpers import zoo
from .helpers.models import random_inputs, train_step
from .helpers.settled import relative_error, settle

NORMS = {"MABN": MABN2d, "BRN": BRN2d, "MBN": MBN2d}


def resnet18(inputs=None, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10, norm_layer=norm)
    return settle(model, inputs=inputs)


def stages(model, x):
    outputs = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: outputs.__setitem__(name, out.detach().clone())
        )
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("own_eps", [1e-5, 1e-3])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_a_resnet_keeps_its_function_in_evaluation_and_in_training(eps, own_eps, dtype, error):
    x = torch.randn(2, 3, 64, 64)
    # PyTorch's own operator has an ε of 0 in some versions only.
    model = resnet18(x, nn.BatchNorm2d if eps else torchvision.ops.FrozenBatchNorm2d)
    for site in find_norm_sites(model, is_norm):
        bn = site.norm
        bn.eps = eps
        bn.weight.data[0] = 0
        # Channels 1 and 2 are dead: what the convolution gives is constant.
        site.convolution.weight.data[1:3] = 0
        bn.running_mean[1:3] = 0
        bn.running_var[1:3] = torch.tensor([1e-12, 0.0 if eps else 1e-12])
    model, x = model.to(dtype), x.to(dtype)
    expected = stages(model, x)
    converted = convert(copy.deepcopy(model), "MABN", eps=own_eps)
    for mode in (False, True):
        got = stages(converted.train(mode), x)
        assert len(got) == 10
        for name, value in expected.items():
            assert relative_error(got[name], value) < error, (name, mode)


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_evaluates_to_the_old_one_and_trains_and_folds(norm):
    model = resnet18()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = convert(copy.deepcopy(model), norm)
    assert sum(type(m) is NORMS[norm] for m in converted.modules()) == 20
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert relative_error(converted(x), expected) < 1e-6
    assert relative_error(fold(converted)(x), expected) < 1e-5
    converted.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in converted.parameters())
    back = convert(converted.eval(), "BN")
    assert relative_error(back(x), converted(x)) == 0
    assert not any(isinstance(m, CenConv2d) for m in back.modules())


def test_a_converted_brn_trains_from_the_running_statistics():
    conv_bn = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 8, 8)
    expected = conv_bn(x)
    converted = convert(copy.deepcopy(conv_bn), "BRN", r_max=100.0, d_max=100.0).train()
    assert relative_error(converted(x), expected) < 1e-5


def test_the_way_back_gives_the_function_of_a_trained_mabn():
    torch.manual_seed(0)
    model = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4))
    settle(model)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    for norm in ("BN", "BRN", "SyncBN", torchvision.ops.FrozenBatchNorm2d):
        converted = convert(copy.deepcopy(model), norm)
        assert type(converted[0]) is nn.Conv2d
        assert relative_error(converted(x), expected) < 1e-6


def test_an_optimizer_keeps_its_hold_on_the_parameters():
    model = resnet18()
    before = {id(p) for p in model.parameters()}
    convert(model, "MABN")
    assert {id(p) for p in model.parameters()} == before
    convert(model, "BN")
    assert {id(p) for p in model.parameters()} == before


@pytest.mark.parametrize("frozen", [FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_a_frozen_norm_becomes_one_that_trains(frozen):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), frozen(4)))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    convert(model, "MABN")
    assert relative_error(model(x), expected) < 1e-6
    model.train()(x).sum().backward()
    assert model[1].weight.grad is not None and model[1].second_moment.count > 1000


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        d2.Conv2d(4, 6, 3),
    ],
)
def test_every_kind_of_convolution_keeps_its_kernel_and_is_centralized(conv):
    torch.manual_seed(0)
    model = settle(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))
    x = torch.randn(2, 4, 6, 6)
    expected, kernel = model(x), conv.weight.detach().clone()
    convert(model, "MABN")
    assert isinstance(conv, (CenConv2d, CenConvTranspose2d)) and conv.centralized
    torch.testing.assert_close(conv.centralized_weight(), kernel, rtol=0, atol=1e-7)
    assert relative_error(model(x), expected) < 1e-6
    model.train()(x).sum().backward()
    kernel_gradient = conv.weight.grad
    if not isinstance(conv, CenConvTranspose2d):
        torch.testing.assert_close(kernel_gradient, centralize_kernel(kernel_gradient))


def test_what_is_converted_and_what_is_left_is_reported_with_the_reason(caplog):
    model = settle(
        nn.ModuleDict(
            dict(
                good=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
                one=nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)),
                relu=nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
                batch=nn.Sequential(
                    nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
                ),
                group=nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)),
                other=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
                linear=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            )
        )
    )
    x = torch.randn(2, 3, 4, 4)
    names = ["good", "one", "relu", "batch", "group", "other"]
    expected = {name: model[name](x) for name in names}
    arguments = dict(where=lambda name: not name.startswith("other"))
    planned = {s.norm_name: s.reason for s in convertible_sites(model, "MABN", **arguments)}
    with caplog.at_level(logging.INFO, "mabn_d2"):
        convert(model, "MABN", **arguments)
    reasons = {
        "relu.2": "fed by 1 (ReLU)",
        "batch.1": "no running statistics",
        "group.1": "GN is not among from_norms",
        "other.1": "its name is not asked for",
        "linear.1": "not 4-D",
    }
    assert {name for name, reason in planned.items() if reason} == set(reasons)
    for name, reason in reasons.items():
        assert reason in planned[name]
        assert any(name in r.message and reason in r.message for r in caplog.records)
    assert "2 of 7 norms are now MABN" in caplog.text
    assert "each filter of one.0 has one element" in caplog.text and not model["one"][0].centralized
    for name in names:
        assert relative_error(model[name](x), expected[name]) < 1e-6


def test_norms_in_front_of_their_convolution_become_norms_that_center():
    torch.manual_seed(0)
    model = settle(torchvision.models.densenet121(weights=None))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    left = [s for s in convertible_sites(model, "MABN") if s.reason]
    assert len(left) == 62 and all("needs a centralized convolution" in s.reason for s in left)
    assert relative_error(convert(copy.deepcopy(model), "MABN")(x), expected) < 1e-5
    converted = convert(model, "BRN")
    assert sum(isinstance(m, BRN2d) for m in converted.modules()) == 121
    assert relative_error(converted(x), expected) < 1e-5


def test_group_norm_is_converted_when_it_is_asked_for_and_loses_its_function(caplog):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    model[1].weight.data.uniform_()
    weight = model[1].weight
    convert(model, "MABN", from_norms=("GN",))
    assert "function not preserved" in caplog.text
    assert isinstance(model[1], MABN2d) and model[1].weight is weight
    assert model[1].second_moment.count == 0 and not model[0].kernel_mean.any()
    layer_norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4))
    convert(layer_norm, "MABN", from_norms=("LN",))
    assert type(layer_norm[1]) is nn.LayerNorm


def test_norms_with_unusual_settings():
    x = torch.randn(2, 3, 6, 6)
    for bn in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None)):
        model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), bn))
        expected = model(x)
        for norm in ("SyncBN", "MABN"):
            converted = convert(copy.deepcopy(model), norm)
            assert relative_error(converted(x), expected) < 1e-6
        assert convert(copy.deepcopy(model), "SyncBN")[1].momentum == bn.momentum
    half = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half())
    convert(half, "MABN")
    assert half[1].weight.dtype == half[0].kernel_mean.dtype == torch.half
    assert half[1].running_var.dtype == torch.float32


def test_a_model_that_is_a_norm_is_returned_as_another():
    bn = settle(nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    converted = convert(bn, "BRN")
    assert isinstance(converted, BRN2d)
    assert torch.equal(converted(x), bn(x))


def test_a_misspelt_name_and_a_wrong_option_are_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="'MABM' is not known, accepted are MABN"):
        convert(model, "MABM")
    with pytest.raises(ValueError, match="from_norms: gn is not known"):
        convert(model, "MABN", from_norms=("gn",))
    with pytest.raises(ValueError, match="buffer_size must be a positive integer"):
        convert(model, "MABN", buffer_size=0)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is nn.BatchNorm2d


def test_a_function_that_divides_by_zero_is_refused():
    norm, one = MABN2d(2), torch.ones(2)
    with pytest.raises(ValueError, match="divides by 0"):
        import_batch_norm(norm, None, one, one, one, torch.tensor([1.0, 0.0]), 0.0)


@pytest.mark.parametrize("before, after", [("BN", "MABN"), ("MABN", "BN"), ("FrozenBN", "MABN")])
@pytest.mark.parametrize("architecture", ["mask_rcnn", "retinanet"])
def test_a_detector_keeps_its_features_and_its_head(architecture, before, after):
    torch.manual_seed(0)
    config = {
        "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    }[architecture]
    model = zoo.build_with(zoo.shrink(zoo.load(config)), before)
    settle(model, inputs=[dict(image=x["image"]) for x in random_inputs()])
    converted = convert(copy.deepcopy(model), after)
    assert not any(s.reason for s in convertible_sites(model, after))
    x = torch.randn(1, 3, 64, 64)
    expected, got = model.backbone(x), converted.backbone(x)
    for level, value in expected.items():
        assert relative_error(got[level], value) < 5e-5
    if architecture == "retinanet":
        features = list(expected.values())
        for a, b in zip(converted.head(features), model.head(features)):
            assert max(map(relative_error, a, b)) < 5e-5
    losses = train_step(converted)
    assert all(loss.isfinite() for loss in losses.values())
    assert mabn_d2.fold(converted) is not converted
