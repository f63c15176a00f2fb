"""What the centralized convolution computes, and how a model gets it."""

import copy
import logging
from pathlib import Path

import detectron2.layers as d2
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mabn_d2.layers import CenConv2d, MABN2d, centralize_kernel
from mabn_d2.plugin.install import CenDeformConv
from mabn_d2.surgery import centralize, find_norm_sites

TRACE = Path(__file__).parent / "data" / "mabn_reference_trace.npz"


@pytest.mark.parametrize(
    "name, options",
    [
        ("conv", dict(padding=1)),
        ("grouped", dict(padding=1, groups=2)),
        ("strided", dict(stride=2)),
    ],
)
def test_every_number_of_the_authors_released_convolution_is_reproduced(name, options):
    trace = {key: torch.from_numpy(value) for key, value in np.load(TRACE).items()}
    conv = CenConv2d(4, 8, 3, bias=False, dtype=torch.float64, **options)
    conv.weight.data.copy_(trace[f"{name}/w"])
    x = trace[f"{name}/x"].requires_grad_()
    y = conv(x)
    y.backward(trace[f"{name}/gy"])
    for key, value in {"y": y, "gx": x.grad, "gw": conv.weight.grad}.items():
        torch.testing.assert_close(value, trace[f"{name}/{key}"], rtol=0, atol=1e-10)


def test_the_mean_is_taken_per_output_channel():
    weight = torch.randn(5, 3, 2, 4) + 1
    centralized = centralize_kernel(weight)
    torch.testing.assert_close(centralized.mean((1, 2, 3)), torch.zeros(5))
    difference = (weight - centralized).flatten(1)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


def same_as(norm, centralized):
    torch.manual_seed(0)
    conv = CenConv2d(3, 4, 3, norm=norm, activation=torch.relu)
    x = torch.randn(2, 3, 6, 6)
    weight = centralize_kernel(conv.weight) if centralized else conv.weight
    expected = nn.functional.conv2d(x, weight, conv.bias)
    expected = torch.relu(expected if norm is None else copy.deepcopy(norm)(expected))
    torch.testing.assert_close(conv(x), expected)


def test_it_centralizes_for_a_mabn_only():
    same_as(MABN2d(4), centralized=True)
    same_as(None, centralized=True)
    same_as(nn.BatchNorm2d(4), centralized=False)


def test_a_detectron2_convolution_is_centralized_where_the_norm_is_attached():
    conv = d2.Conv2d(3, 4, 3, bias=False, norm=d2.get_norm("MABN", 4), activation=torch.relu)
    plain = d2.Conv2d(3, 4, 3, bias=False, norm=d2.get_norm("BN", 4))
    assert type(conv) is CenConv2d and type(plain) is d2.Conv2d
    assert list(conv.state_dict())[0] == "weight"


def test_a_deformable_convolution_uses_the_centralized_kernel_and_keeps_the_raw_one():
    torch.manual_seed(0)
    conv = d2.DeformConv(3, 4, 3, padding=1, norm=d2.get_norm("MABN", 4)).eval()
    assert type(conv) is CenDeformConv
    if not torch.cuda.is_available():
        # Detectron2 compiles the operator for GPUs alone; see which kernel reaches it.
        seen = []
        module = __import__("detectron2.layers.deform_conv", fromlist=["x"])
        original = module.deform_conv
        module.deform_conv = lambda x, offset, weight, *_: (
            seen.append(weight) or torch.zeros(2, 4, 5, 5)
        )
        try:
            conv(torch.randn(2, 3, 5, 5), torch.zeros(2, 18, 5, 5))
        finally:
            module.deform_conv = original
        torch.testing.assert_close(seen[0], centralize_kernel(conv.weight))
    assert isinstance(conv.weight, nn.Parameter)
    assert conv.weight.mean((1, 2, 3)).abs().max() > 1e-3


def with_mabn(model):
    """Replaces the BNs of a model."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, MABN2d(child.num_features))
        else:
            with_mabn(child)
    return model


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "regnet_y_400mf", "mobilenet_v2"])
def test_every_convolution_of_a_torchvision_model_that_feeds_a_mabn_is_found(architecture):
    model = with_mabn(getattr(torchvision.models, architecture)(weights=None))
    names = list(model.state_dict())
    sites = centralize(model)
    norms = [m for m in model.modules() if isinstance(m, MABN2d)]
    convolutions = [m for m in model.modules() if isinstance(m, CenConv2d)]
    assert len(sites) == len(norms) == len(convolutions) > 10
    assert [name for name in model.state_dict() if not name.endswith("kernel_mean")] == names

    fed_by = {}
    for conv in convolutions:
        conv.register_forward_hook(lambda m, _, y: fed_by.__setitem__(id(y), m))
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, args: flow.append((m, fed_by[id(args[0])])))
    flow = []
    model(torch.randn(2, 3, 64, 64))
    assert {id(n): id(c) for n, c in flow} == {id(s.norm): id(s.convolution) for s in sites}


def test_a_norm_without_a_centralized_convolution_is_warned_of_by_name(caplog):
    relu_between = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), MABN2d(4))
    first = nn.Sequential(MABN2d(3), nn.Conv2d(3, 4, 3))
    unknown = nn.Sequential(torchvision.ops.DeformConv2d(4, 4, 3), MABN2d(4))
    good = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), MABN2d(4))
    with caplog.at_level(logging.INFO):
        centralize(nn.ModuleDict(dict(a=relu_between, b=first, c=unknown, d=good)))
    warned = [r.message.split()[1] for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == ["a.2", "b.0", "c.1"]
    assert "c.0 (DeformConv2d)" in caplog.text
    assert "4 norms, 1 centralized convolutions" in caplog.text


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_centralized_per_output_channel(groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups, bias=False), MABN2d(6))
    raw = model[0].weight.detach().clone()
    assert centralize(model)[0].centralized
    # The response of output channel o to an input of ones, summed over the kernel's positions.
    response = model[0](torch.ones(1, 4, 1, 1)).sum((0, 2, 3))
    torch.testing.assert_close(response, torch.zeros(6), rtol=0, atol=1e-6)
    assert torch.equal(model[0].weight, raw) and raw.abs().sum() > 0


def test_centralizing_twice_is_centralizing_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4))
    centralize(model), centralize(model)
    assert type(model[0]) is CenConv2d
    assert [site.centralized for site in find_norm_sites(model)] == [True]


@pytest.mark.parametrize(
    "options",
    [
        dict(padding=1),
        dict(stride=2, padding=1, bias=False),
        dict(dilation=2, padding="same"),
        dict(padding=1, padding_mode="reflect"),
        dict(groups=2),
    ],
)
@pytest.mark.parametrize("size", [(2, 64, 4, 5), (2, 64, 40, 40), (0, 64, 4, 4), (64, 4, 4)])
def test_an_evaluation_without_gradient_gives_the_same_from_few_values_and_from_many(size, options):
    torch.manual_seed(0)
    conv = CenConv2d(64, 32, 3, **options, dtype=torch.float64).eval()
    conv.kernel_mean.uniform_(-0.1, 0.1)
    x = torch.randn(size, dtype=torch.float64) + 1
    expected = conv(x)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


def test_an_evaluation_of_few_values_makes_no_centralized_kernel(monkeypatch):
    conv = CenConv2d(64, 64, 3, padding=1).eval()
    monkeypatch.setattr(conv, "centralized_weight", lambda: pytest.fail("a kernel is made"))
    with torch.no_grad():
        conv(torch.randn(1, 64, 4, 4))
