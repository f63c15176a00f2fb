"""Whole files of detectors: boxes and masks after NMS are the source's before the first training step."""

import pickle
import re

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import boxes
from torchvision.ops.misc import FrozenBatchNorm2d

from mabn_d2.checkpoint import Checkpointer

from .helpers import load_tool
from .helpers.models import small_cfg
from .helpers.settled import measure, relative_error

SIZE = 64


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs tools/convert_weights.py; returns the config that it prints and all that it prints."""

    def run(*arguments, status=0):
        monkeypatch.setattr("sys.argv", ["convert_weights.py", *map(str, arguments)])
        assert load_tool("convert_weights").main() == status
        out, error = capsys.readouterr()
        return out + error

    return run


@pytest.fixture(autouse=True)
def nms_in_float64(monkeypatch):
    """Detectron2 makes the boxes float32, which torchvision does not take beside scores in float64."""
    nms = boxes.batched_nms
    monkeypatch.setattr(boxes, "batched_nms", lambda boxes, *rest: nms(boxes.double(), *rest))


def images():
    return [255 * torch.rand(3, SIZE, SIZE, generator=torch.manual_seed(n)) for n in (1, 2)]


@torch.no_grad()
def trained(model, predictor, run):
    """Statistics of the images in float64, scores that differ, a dead channel of each kind in each norm."""
    torch.manual_seed(0)
    model.double().eval()
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
    for module in model.modules():
        if hasattr(module, "kernel_mean"):
            module.kernel_mean.uniform_(-0.01, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.uniform_(-0.1, 0.1)
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    run()
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var[0], norm.weight[0] = 0, 0
        norm.running_var[1], norm.weight[1] = 1e-12, 1e-6
    predictor.weight.normal_(0, 1)
    return model


def detector(norm="", backbone="MABN", *options):
    cfg = small_cfg(norm, "MODEL.RESNETS.NORM", backbone, *options)
    torch.manual_seed(0)  # of what a file does not hold
    return build_model(cfg).double().eval()


@torch.no_grad()
def predictions(model):
    """Boxes, scores, classes and masks after NMS, pasted into the image."""
    inputs = [{"image": image.double(), "height": SIZE, "width": SIZE} for image in images()]
    return [output["instances"].get_fields() for output in model.eval()(inputs)]


def assert_same_predictions(model, source, tolerance=1e-8):
    for got, expected in zip(predictions(model), predictions(source)):
        assert len(expected["scores"]) > 5
        assert got.keys() == expected.keys() and "pred_masks" in got
        # Detectron2 computes boxes in float32.
        torch.testing.assert_close(
            got["pred_boxes"].tensor, expected["pred_boxes"].tensor, rtol=1e-6, atol=1e-5
        )
        torch.testing.assert_close(got["scores"], expected["scores"], rtol=0, atol=tolerance)
        assert torch.equal(got["pred_classes"], expected["pred_classes"])
        assert (got["pred_masks"] != expected["pred_masks"]).double().mean() < 1e-4


def coco_detector(norm="", backbone="FrozenBN"):
    model = detector(norm, backbone)
    return trained(model, model.roi_heads.box_predictor.cls_score, lambda: predictions(model))


@pytest.mark.parametrize("ours, rest", [("MABN", ""), ("MABN", "BN"), ("BRN", ""), ("MBN", "BN")])
def test_of_detectron2s_zoo(ours, rest, tmp_path):
    source, model = coco_detector(rest), detector(ours, ours)
    state = {key: value.numpy() for key, value in source.state_dict().items()}
    with open(tmp_path / "model_final_f10217.pkl", "wb") as f:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, f)
    Checkpointer(model).load(str(tmp_path / "model_final_f10217.pkl"))
    assert_same_predictions(model, source)


def test_of_caffe2(tmp_path):
    """Of an ImageNet file both detectors have the heads of the same initialization."""
    source = coco_detector()
    blobs = {}
    for name, value in source.backbone.bottom_up.state_dict().items():
        if "running" in name:  # folded
            continue
        name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
        if re.match(r"res\d", name):
            for ours, theirs in (
                ("shortcut", "branch1"),
                ("conv1", "branch2a"),
                ("conv2", "branch2b"),
            ):
                name = name.replace(ours, theirs)
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
        name = name.replace("_bn.weight", "_bn_s").replace("_bn.bias", "_bn_b")
        name = name.replace(".weight", "_w").replace(".", "_")
        blobs[name] = blobs[f"{name}_momentum"] = value.numpy()
    with open(tmp_path / "R-18.pkl", "wb") as f:
        pickle.dump({"blobs": blobs}, f, protocol=2)
    models = [detector("", backbone) for backbone in ("FrozenBN", "MABN")]
    for model in models:
        Checkpointer(model).load(str(tmp_path / "R-18.pkl"))
        model.roi_heads.box_predictor.load_state_dict(source.roi_heads.box_predictor.state_dict())
    for module in models[0].backbone.bottom_up.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(1 - module.eps)  # in float64
    stem = models[0].backbone.bottom_up.stem.conv1
    assert torch.equal(stem.norm.bias, source.backbone.bottom_up.stem.conv1.norm.bias)
    assert_same_predictions(models[1], models[0])


# ---------------------------------------------------------------------------- torchvision's detectors


def torchvision_detector(eps, num_classes):
    resnet = torchvision.models.resnet18(norm_layer=lambda n: FrozenBatchNorm2d(n, eps=eps))
    layers = {f"layer{n + 1}": str(n) for n in range(4)}
    backbone = BackboneWithFPN(resnet, layers, [64, 128, 256, 512], 16)
    model = mask_rcnn.MaskRCNN(
        backbone, min_size=SIZE, max_size=SIZE,
        rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=30, box_detections_per_img=20,
        box_head=faster_rcnn.TwoMLPHead(16 * 7 * 7, 32),
        box_predictor=faster_rcnn.FastRCNNPredictor(32, num_classes),
        mask_head=mask_rcnn.MaskRCNNHeads(16, (16,) * 4, 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 16, num_classes),
    )  # fmt: skip
    run = lambda: model([image.double() / 255 for image in images()])  # noqa: E731
    model = trained(model, model.roi_heads.box_predictor.cls_score, run)
    if eps == 0:
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):  # 0 / 0 else
                module.running_var[0] = 1e-12
    return model


def detector_of(config, folder, *options):
    """Of the lines that the tool prints."""
    (folder / "part.yaml").write_text(config + "\nVERSION: 2\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "part.yaml"))
    cfg.merge_from_list([
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DEVICE", "cpu",
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 30,
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
        "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "TEST.DETECTIONS_PER_IMAGE", 20,
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", *options,
    ])  # fmt: skip
    model = build_model(cfg).double().eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


@pytest.mark.parametrize("eps, num_classes", [(0, 91), (1e-3, 4)])
def test_of_torchvision(convert, eps, num_classes, tmp_path):
    source = torchvision_detector(eps, num_classes)
    torch.save(source.state_dict(), tmp_path / "src.pth")
    options = ("--eps", eps) if eps else ()
    out = convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--from", "torchvision", *options)
    assert ("80" in out) == (num_classes == 91)
    config = re.search(r"config:\n(.*?)\n\n", out, flags=re.S)[1]
    model = detector_of(config, tmp_path)
    ours = detector_of(config, tmp_path, *(
        option for key in ("RESNETS", "FPN", "ROI_MASK_HEAD") for option in (f"MODEL.{key}.NORM", "MABN")
    ))  # fmt: skip
    assert_same_predictions(ours, model)
    if num_classes == 91:
        return
    for anchors in model.proposal_generator.anchor_generator.cell_anchors:
        anchors.round_()
    masks = []
    for predictor in (model.roi_heads.mask_head.predictor, source.roi_heads.mask_predictor):
        predictor.register_forward_hook(lambda module, args, out: masks.append(out))
    with torch.no_grad():
        found = predictions(model)
        expected = source([image.double() / 255 for image in images()])
    for got, theirs in zip(found, expected):
        assert len(got["scores"]) > 5
        assert relative_error(got["pred_boxes"].tensor, theirs["boxes"]) < 1e-5
        assert relative_error(got["scores"], theirs["scores"]) < 1e-5
        assert torch.equal(got["pred_classes"], theirs["labels"] - 1)
    assert relative_error(masks[0], masks[1][:, 1:]) < 1e-5  # pasted in another way


# ------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("ours", ["FrozenBN", "BN"])
def test_the_file_of_a_mabn_as_one_of_bn(convert, ours, tmp_path):
    source = coco_detector("MABN", "MABN")
    torch.save({"model": source.state_dict()}, tmp_path / "src.pth")
    out = convert(
        tmp_path / "src.pth", tmp_path / "dst.pth", "--from", "detectron2", "--norm", "BN"
    )
    assert "norm BN" in out
    state = torch.load(tmp_path / "dst.pth")["model"]
    assert not any("psi" in key or "kernel_mean" in key for key in state)
    model = detector(ours, ours)
    model.load_state_dict(state, strict=ours == "FrozenBN")  # BN counts batches, too
    assert_same_predictions(model, source, 1e-5)  # statistics are written in float32
    error = convert(tmp_path / "dst.pth", tmp_path / "x.pth", "--from", "detectron2", "--norm", "BN",
                    status=2)  # fmt: skip
    assert "dst.pth holds no MABN, --norm BN accepts MABN" in error
