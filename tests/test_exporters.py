"""A model in evaluation mode passes through PyTorch's exporters, with its norms and folded."""

import io

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils import fusion
from torchvision.models.feature_extraction import create_feature_extractor

from mabn_d2 import BRN2d, CenConv2d, MABN2d, MBN2d, convert, fold
from mabn_d2.layers import GhostBatchNorm2d

from .helpers.settled import relative_error, settle

NORMS = {"MABN": MABN2d, "BRN": BRN2d, "MBN": MBN2d, "GhostBN": GhostBatchNorm2d}


def to_onnx(model, x):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, opset_version=17, **onnx_options())
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def onnx_options():
    """The exporter that traces is the default of torch 2.3 and an option of newer ones."""
    return {} if torch.__version__ < "2.5" else {"dynamo": False}


EXPORTERS = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "fx": lambda model, x: fx.symbolic_trace(model),
    "prepare_fx": lambda model, x: prepare_fx(model, get_default_qconfig_mapping(), (x,)),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "onnx": to_onnx,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_norm_alone_is_exported(exporter, norm):
    model = settle(NORMS[norm](4))
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    exported = EXPORTERS[exporter](model, x)
    assert relative_error(exported(x), expected) < 1e-6


def resnet(norm):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    if norm == "GhostBN":
        return settle(convert(model, GhostBatchNorm2d))
    return settle(convert(model, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_resnet_is_exported_with_its_norms(exporter, norm):
    model, x = resnet(norm), torch.randn(2, 3, 32, 32)
    expected = model(x)
    exported = EXPORTERS[exporter](model, x)
    with torch.no_grad():
        assert relative_error(exported(x), expected) < 1e-5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_folded_resnet_is_exported(exporter):
    model, x = resnet("MABN"), torch.randn(2, 3, 32, 32)
    exported = EXPORTERS[exporter](fold(model), x)
    with torch.no_grad():
        assert relative_error(exported(x), model(x)) < 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_features_are_extracted_in_evaluation_and_in_training(norm):
    model, x = resnet(norm), torch.randn(2, 3, 32, 32)
    extractor = create_feature_extractor(model, {"layer2": "features"})
    seen = {}
    model.layer2.register_forward_hook(lambda m, args, out: seen.update(features=out))
    model(x)
    assert relative_error(extractor.eval()(x)["features"], seen["features"]) < 1e-6
    before = model.bn1.running_var.clone()
    extractor.train()(x)["features"].sum().backward()
    assert model.bn1.weight.grad.isfinite().all()
    assert not torch.equal(model.bn1.running_var, before)


@pytest.mark.parametrize("norm", NORMS)
def test_pytorchs_own_fusion_is_right_or_refuses(norm):
    model = settle(nn.Sequential(CenConv2d(3, 4, 3), NORMS[norm](4)))
    model[0].centralized = norm == "MABN"
    x = torch.randn(2, 3, 5, 5)
    if norm == "MABN":
        with pytest.raises(ValueError, match="use mabn_d2.surgery.fold"):
            fusion.fuse_conv_bn_eval(*model)
    else:
        assert relative_error(fusion.fuse_conv_bn_eval(*model)(x), model(x)) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_model_holds_no_norm_and_no_mean_of_a_kernel(norm):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    file = io.BytesIO()
    x = torch.randn(1, 3, 32, 32)
    torch.onnx.export(fold(resnet(norm)), (x,), file, opset_version=17, **onnx_options())
    kinds = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert "Conv" in kinds
    assert not kinds & {"BatchNormalization", "InstanceNormalization", "ReduceMean", "Sub"}
