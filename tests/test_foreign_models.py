"""`convert` and `fold` on models of torchvision and timm, and on one as torch.hub has them."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation

from mabn_d2 import MABN2d, convert, fold
from mabn_d2.layers import CentralizedKernel
from mabn_d2.surgery import convertible_sites, foldable_sites

from .helpers.settled import relative_error, settle

UNTRAINED = dict(weights=None, weights_backbone=None)
DETECTIONS = dict(num_classes=5, min_size=64, max_size=96)
DENSE = dict(score_thresh=0.0, detections_per_img=5)
REGIONS = dict(
    box_score_thresh=0.0, box_detections_per_img=5, rpn_pre_nms_top_n_test=20,
    rpn_post_nms_top_n_test=10,
)  # fmt: skip


def timm(name):
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name)


# Name -> how to make it, and how many norms stay because no convolution stands in front.
CLASSIFIERS = {
    "torchvision resnet18": (lambda: models.resnet18(), 0),
    "torchvision regnet_y_400mf": (lambda: models.regnet_y_400mf(), 0),
    "torchvision mobilenet_v2": (lambda: models.mobilenet_v2(), 0),
    "torchvision mobilenet_v3_small": (lambda: models.mobilenet_v3_small(), 0),
    "torchvision efficientnet_b0": (lambda: models.efficientnet_b0(), 0),
    "torchvision densenet121": (lambda: models.densenet121(), 62),
    "timm resnet18": (lambda: timm("resnet18"), 0),
    "timm regnetx_002": (lambda: timm("regnetx_002"), 0),
    "timm regnety_002": (lambda: timm("regnety_002"), 0),
    "timm efficientnet_b0": (lambda: timm("efficientnet_b0"), 0),
    "timm mobilenetv3_small_050": (lambda: timm("mobilenetv3_small_050"), 0),
    "timm hrnet_w18_small": (lambda: timm("hrnet_w18_small"), 0),
    "timm resnetv2_50": (lambda: timm("resnetv2_50"), 17),
}
DETECTORS = {
    "Mask R-CNN": (
        lambda: detection.maskrcnn_resnet50_fpn(**UNTRAINED, **DETECTIONS, **REGIONS),
        [],
    ),
    "Mask R-CNN v2": (
        lambda: detection.maskrcnn_resnet50_fpn_v2(**UNTRAINED, **DETECTIONS, **REGIONS),
        [],
    ),
    "FCOS": (lambda: detection.fcos_resnet50_fpn(**UNTRAINED, **DETECTIONS, **DENSE), ["GN"] * 8),
}


def reasons_to_stay(model):
    to_fold, to_convert = (
        [site.reason for site in sites if site.reason]
        for sites in (foldable_sites(model), convertible_sites(model, "MABN"))
    )
    assert len(to_fold) == len(to_convert)
    return to_convert


def folded_converted_and_both(model):
    """Three models of the same function."""
    converted = convert(copy.deepcopy(model), "MABN")
    both = fold(converted)
    assert not any(isinstance(m, CentralizedKernel) for m in both.modules())
    return {"folded": fold(model), "converted": converted, "converted and folded": both}


def assert_it_trains(model, x):
    loss = sum(out.square().mean() for out in outputs(model.train()(x)).values())
    loss.backward()
    assert any(isinstance(m, MABN2d) for m in model.modules())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def outputs(output):
    return output if isinstance(output, dict) else {"": output}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_converted_and_folded(name):
    make, stay = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = settle(make())
    x = torch.randn(2, 3, 64, 64)
    assert len(reasons_to_stay(model)) == stay
    with torch.no_grad():
        expected = model(x)
        for how, other in folded_converted_and_both(model).items():
            assert relative_error(other(x), expected) < 1e-5, how
    assert_it_trains(convert(model, "MABN"), x)


def test_a_segmentation_network_is_converted_and_folded():
    torch.manual_seed(0)
    model = settle(segmentation.deeplabv3_resnet50(**UNTRAINED, aux_loss=True))
    x = torch.randn(2, 3, 33, 33)
    assert reasons_to_stay(model) == []
    with torch.no_grad():
        expected = model(x)
        for how, other in folded_converted_and_both(model).items():
            for part, value in other(x).items():
                assert relative_error(value, expected[part]) < 1e-5, (how, part)
    assert_it_trains(convert(model, "MABN"), x)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_converted_and_folded(name):
    """In float64, where rounding does not decide which box is suppressed."""
    make, stay = DETECTORS[name]
    torch.manual_seed(0)
    model, image = make().double(), torch.rand(3, 64, 80, dtype=torch.float64)
    settle(model, inputs=[image])
    assert [reason.split()[0] for reason in reasons_to_stay(model)] == stay
    with torch.no_grad():
        features, (expected,) = model.backbone(image[None]), model([image])
        assert len(expected["scores"]) == 5
        for how, other in folded_converted_and_both(model).items():
            for level, value in other.backbone(image[None]).items():
                assert relative_error(value, features[level]) < 1e-9, (how, level)
            (got,) = other([image])
            for part, value in expected.items():
                assert relative_error(got[part].double(), value.double()) < 1e-9, (how, part)


class Misleading(nn.Module):
    """Convolutions are assigned before norms, in another order than they are called."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn1(self.conv2(self.bn2(self.conv1(x)).relu()))


class Untraceable(Misleading):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


@pytest.mark.parametrize("kind", [Misleading, Untraceable])
def test_an_order_of_assignment_that_misleads_is_not_followed(kind):
    torch.manual_seed(0)
    model, x = settle(kind()), torch.randn(2, 3, 8, 8)
    example = x if kind is Untraceable else None
    if kind is Untraceable:
        reasons = {site.norm_name: site.reason for site in foldable_sites(model)}
        assert all("an example input tells" in reason for reason in reasons.values()), reasons
        assert relative_error(fold(model)(x), model(x)) == 0
        assert not any(
            isinstance(m, MABN2d) for m in convert(copy.deepcopy(model), "MABN").modules()
        )
    pairs = {(s.norm_name, s.convolution_name) for s in foldable_sites(model, example)}
    assert pairs == {("bn2", "conv1"), ("bn1", "conv2")}
    expected = model(x)
    folded = fold(model, example)
    assert {type(m) for m in (folded.bn1, folded.bn2)} == {nn.Identity}
    assert relative_error(folded(x), expected) < 1e-6
    convert(model, "MABN", example_input=example)
    assert model.conv1.centralized and model.conv2.centralized
    assert relative_error(model(x), expected) < 1e-6
