"""Which convolution feeds which norm."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from mabn_d2.surgery import find_norm_sites
from mabn_d2.surgery.sites import is_norm


def pairs(model, example_input=None):
    sites = find_norm_sites(model, is_norm, example_input)
    return {site.norm_name: site.convolution_name for site in sites}


class Block(nn.Module):
    """Its children are assigned in one order and called in another."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Untraceable(Block):
    def forward(self, x):
        if x.sum() > -1e9:
            x = super().forward(x)
        return x


X = torch.ones(2, 3, 4, 4)


def test_the_forward_tells_where_the_order_of_assignment_misleads():
    sites = find_norm_sites(Block(), is_norm)
    assert {s.norm_name: s.convolution_name for s in sites} == dict(bn1="conv1", bn2="conv2")
    assert {s.evidence for s in sites} == {"forward"}


def test_an_ambiguous_order_that_no_forward_explains_is_not_guessed():
    for site in find_norm_sites(Untraceable(), is_norm):
        assert site.convolution is None
        assert "order conv1, conv2, bn1, bn2 is ambiguous" in site.reason
        assert "example input" in site.reason


def test_an_example_input_tells_what_the_structure_does_not():
    model = Untraceable().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sites = find_norm_sites(model, is_norm, X)
    assert {s.norm_name: s.convolution_name for s in sites} == dict(bn1="conv1", bn2="conv2")
    assert {s.evidence for s in sites} == {"example"}
    assert model.training and model.bn1.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_convolutions_and_norms_in_two_lists_are_paired_by_the_forward():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms):
                x = norm(conv(x))
            return x

    expected = {f"norms.{i}": f"convs.{i}" for i in range(3)}
    assert pairs(Lists()) == pairs(Lists(), X) == expected


class Through(nn.Module):
    """A convolution, something, and a norm of 3 channels."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), between

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


@pytest.mark.parametrize("example_input", [None, X], ids=["structure", "example"])
@pytest.mark.parametrize(
    "between, is_transparent",
    [
        (nn.ReLU(), False),
        (nn.ReLU(inplace=True), False),
        (nn.MaxPool2d(1), False),
        (lambda y: torch.cat([y, y], 1)[:, :3], False),
        (lambda y: y + 1, False),
        (nn.Identity(), True),
        (nn.Dropout(), True),
    ],
)
def test_what_stands_between_is_told_apart(between, is_transparent, example_input):
    (site,) = find_norm_sites(Through(between), is_norm, example_input)
    assert (site.convolution_name == "conv" and not site.reason) == is_transparent


@pytest.mark.parametrize("example_input", [None, X], ids=["structure", "example"])
def test_a_convolution_whose_output_goes_elsewhere_too_is_named(example_input):
    class Twice(Through):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    (site,) = find_norm_sites(Twice(None), is_norm, example_input)
    assert site.convolution_name == "conv"
    assert site.reason == "the output of conv is used elsewhere, too"


@pytest.mark.parametrize("example_input", [None, X], ids=["structure", "example"])
def test_a_norm_that_is_called_twice_has_two_sites(example_input):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv2(self.norm(self.conv1(x))))

    sites = find_norm_sites(Shared(), is_norm, example_input)
    assert [s.norm_name for s in sites] == ["norm", "norm"]
    assert [s.convolution_name for s in sites] == ["conv1", "conv2"]


def test_a_norm_in_front_of_its_convolution_is_given_the_one_before():
    model = torchvision.models.densenet121(weights=None)
    found = pairs(model)
    layer = "features.denseblock1.denselayer2."
    assert found["features.norm0"] == "features.conv0"
    assert found[layer + "norm1"] is None  # behind a concatenation
    assert found[layer + "norm2"] == layer + "conv1"
    assert found["features.transition1.norm"] is None
    assert found["features.norm5"] is None


def test_the_module_that_holds_the_norm_need_not_hold_the_convolution():
    class Act(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.norm(x))

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), Act())
    assert pairs(model) == {"1.norm": "0.0"}
    (site,) = find_norm_sites(Act(), is_norm)
    assert site.convolution is None and "input of its Act" in site.reason
