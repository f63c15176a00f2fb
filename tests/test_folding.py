"""`fold`: the same function with norms inside of their convolutions."""

import copy
import logging
from importlib.util import find_spec

import detectron2.layers as d2
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import CycleBatchNormList
from detectron2.layers.batch_norm import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

import mabn_d2
from mabn_d2 import BRN2d, CenConv2d, MABN2d, MBN2d
from mabn_d2.data import make_synthetic_coco
from mabn_d2.engine import Trainer
from mabn_d2.layers import CentralizedKernel
from mabn_d2.surgery import fold, foldable_sites
from mabn_d2.surgery.folding import ChannelAffine, InTurn

from .helpers import zoo
from .helpers.models import SIZE, random_inputs
from .helpers.runs import cfg_for
from .helpers.settled import relative_error, settle

NORMS = {
    "MABN": MABN2d,
    "BRN": BRN2d,
    "MBN": MBN2d,
    "BN": nn.BatchNorm2d,
    "BN without affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "torchvision's FrozenBN": torchvision.ops.FrozenBatchNorm2d,
}
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "without bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed and grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "Detectron2's": lambda: d2.Conv2d(4, 6, 3),
}


def channels_of(convolution):
    return convolution.out_channels


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_the_pair_becomes_a_plain_convolution_of_the_same_function(convolution, norm):
    torch.manual_seed(0)
    conv = CONVOLUTIONS[convolution]()
    model = nn.Sequential(conv, NORMS[norm](channels_of(conv)), nn.ReLU())
    mabn_d2.centralize(model)
    settle(model)
    x = torch.randn(2, 4, 7, 7)
    expected = model(x)
    folded = fold(model)
    assert relative_error(folded(x), expected) < 1e-6
    assert not isinstance(folded[0], CentralizedKernel) and type(folded[1]) is nn.Identity
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(model(x), expected)


def test_the_original_keeps_training_and_the_copy_keeps_its_values():
    model = settle(nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4)))
    folded = fold(model.train())
    assert model.training and not folded.training
    x = torch.randn(2, 3, 5, 5)
    before = folded(x)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert torch.equal(folded(x), before)
    assert not {p.data_ptr() for p in folded.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


@pytest.mark.parametrize("channels", [4, 6])
def test_a_linear_layer_takes_in_its_norm(channels):
    model = settle(nn.Sequential(nn.Linear(5, channels, bias=False), nn.BatchNorm1d(channels)))
    x = torch.randn(3, 5)
    folded = fold(model)
    assert type(folded[1]) is nn.Identity
    assert relative_error(folded(x), model(x)) < 1e-6


def test_convolutions_of_one_and_three_dimensions_take_in_their_norm():
    for conv, norm, x in [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), torch.randn(2, 3, 7)),
        (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), torch.randn(2, 3, 5, 5, 5)),
        (nn.ConvTranspose3d(2, 4, 3, groups=2), nn.BatchNorm3d(4), torch.randn(2, 2, 5, 5, 5)),
    ]:
        model = settle(nn.Sequential(conv, norm))
        folded = fold(model)
        assert type(folded[1]) is nn.Identity
        assert relative_error(folded(x), model(x)) < 1e-6


def test_a_deformable_convolution_of_torchvision_takes_in_its_norm():
    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torchvision.ops.DeformConv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            offset = x.new_full((len(x), 18, x.shape[2] - 2, x.shape[3] - 2), 0.3)
            return self.norm(self.conv(x, offset))

    model = settle(Deformable())
    x = torch.randn(2, 3, 6, 6)
    folded = fold(model, x)
    assert type(folded.norm) is nn.Identity
    assert relative_error(folded(x), model(x)) < 1e-6


@pytest.mark.skipif(find_spec("detectron2._C") is None, reason="Detectron2 without _C")
@pytest.mark.parametrize("name", ["DeformConv", "ModulatedDeformConv"])
def test_a_deformable_convolution_of_detectron2_takes_in_its_norm(name, monkeypatch):
    torch.manual_seed(0)
    module = __import__("detectron2.layers.deform_conv", fromlist=["x"])

    def modulated(x, offset, mask, kernel, bias, stride, padding, dilation, *_):
        return torchvision.ops.deform_conv2d(
            x, offset, kernel, bias, stride, padding, dilation, mask
        )

    monkeypatch.setattr(module, "modulated_deform_conv", modulated)
    monkeypatch.setattr(
        module,
        "deform_conv",
        lambda x, offset, *rest: modulated(x, offset, None, rest[0], None, *rest[1:]),
    )
    conv = getattr(d2, name)(3, 4, 3, norm=d2.get_norm("MABN", 4), activation=torch.relu)
    settle(conv)
    x, offset, mask = torch.randn(2, 3, 5, 5), torch.randn(2, 18, 3, 3), torch.rand(2, 9, 3, 3)
    args = (x, offset, mask)[: 2 if name == "DeformConv" else 3]
    folded = fold(conv)
    assert type(folded) is getattr(d2, name)
    assert not any(isinstance(m, MABN2d) for m in folded.modules())
    assert relative_error(folded(*args), conv(*args)) < 1e-6


def test_a_norm_that_two_calls_share_is_folded_into_both_convolutions():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv2(self.norm(self.conv1(x)).relu()))

    model = settle(Shared())
    x = torch.randn(2, 3, 4, 4)
    folded = fold(model)
    assert type(folded.norm) is nn.Identity
    assert relative_error(folded(x), model(x)) < 1e-6


def left(model, example_input=None):
    return {s.norm_name: s.reason for s in foldable_sites(model, example_input) if s.reason}


def test_what_cannot_be_folded_stays_and_is_logged_by_name_with_the_reason(caplog):
    shared = nn.Conv2d(3, 3, 1)
    model = nn.ModuleDict(
        dict(
            batch=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            group=nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)),
            relu=nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
            a=nn.Sequential(shared, nn.BatchNorm2d(3)),
            b=nn.Sequential(shared, nn.BatchNorm2d(3)),
            weight=nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
            ),
            good=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        )
    )
    settle(model)
    x = torch.randn(2, 3, 4, 4)
    expected = {name: part(x) for name, part in model.items()}
    with caplog.at_level(logging.INFO, "mabn_d2"):
        folded = fold(model)
    for name, part in folded.items():
        assert relative_error(part(x), expected[name]) < 1e-6
    reasons = {
        "batch.1": "no running statistics",
        "group.1": "no running statistics",
        "relu.2": "fed by 1 (ReLU)",
        "a.1": "a.0 feeds b.1, too",
        "b.1": "a.0 feeds a.1, too",
        "weight.1": "the weight of weight.0 is no parameter but computed",
    }
    assert set(left(model)) == set(reasons)
    for name, reason in reasons.items():
        assert reason in left(model)[name]
        assert any(name in r.message and reason in r.message for r in caplog.records)
    assert "1 of 7 norms are in their convolution" in caplog.text


def test_a_subclass_of_bn_with_a_function_of_its_own_is_left_alone():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = settle(nn.Sequential(nn.Conv2d(3, 3, 1), Doubling(3)))
    assert "does not evaluate to BN's affine map" in left(model)["1"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fold(model)(x), model(x))


def test_the_order_of_assignment_alone_is_not_enough():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > -1e9 else x

    model, x = settle(Untraceable()), torch.randn(2, 3, 4, 4)
    assert "order of assignment" in left(model)["norm"]
    assert left(model, x) == {}
    assert relative_error(fold(model, x)(x), model(x)) < 1e-6


def test_dead_channels_and_half_precision():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var[:2] = torch.tensor([0.0, 1e-12])
    model[1].weight.data[2] = 0
    x = torch.randn(2, 3, 5, 5)
    assert relative_error(fold(model)(x), model(x)) < 1e-6
    half = fold(copy.deepcopy(model).half())
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.half}
    model[1].eps = 0.0
    assert left(model) == {"1": "its map is not finite"}


# ---- whole models --------------------------------------------------------------------------------


def test_mask_rcnn_of_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None
    )
    settle(model)
    assert left(model) == {}
    folded = fold(model)
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 96)
        expected, got = model.backbone(x), folded.backbone(x)
        for level in expected:
            assert relative_error(got[level], expected[level]) < 1e-5
        regions = torch.randn(3, 256, 7, 7)
        for head in ("box_head", "mask_head"):
            expected = getattr(model.roi_heads, head)(regions)
            assert relative_error(getattr(folded.roi_heads, head)(regions), expected) < 1e-5


def tensors(output):
    """All tensors of an output of Detectron2, by name."""
    if isinstance(output, torch.Tensor):
        yield "", output
    elif hasattr(output, "get_fields"):
        for name, value in output.get_fields().items():
            value = getattr(value, "tensor", value)
            yield name, value
    elif isinstance(output, dict):
        for key, value in output.items():
            for name, tensor in tensors(value):
                yield f"{key}.{name}", tensor
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            for name, tensor in tensors(value):
                yield f"{i}.{name}", tensor


DETECTRON2_MODELS = {
    "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "FCOS": "COCO-Detection/fcos_R_50_FPN_1x.py",
    "Cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Panoptic FPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "RegNet": "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
    "keypoints": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "DeepLab": zoo.deeplab_v3plus,
    "depthwise DeepLab": zoo.deeplab_v3plus_depthwise_separable,
    "modulated": zoo.mask_rcnn_modulated_deformable,
}


def images():
    torch.manual_seed(1)
    return [dict(image=x["image"]) for x in random_inputs()]


def build_tiny(architecture, norm):
    torch.manual_seed(0)
    config = zoo.shrink(zoo.load(DETECTRON2_MODELS[architecture]))
    zoo.set_where_present(
        config, dict(SCORE_THRESH_TEST=0.0, test_score_thresh=0.0, DETECTIONS_PER_IMAGE=10)
    )
    return settle(zoo.build_with(config, norm), inputs=images())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["MABN", "BN", "FrozenBN", "MBN"])
@pytest.mark.parametrize("architecture", [n for n in DETECTRON2_MODELS if n != "modulated"])
def test_a_model_of_detectron2(architecture, norm):
    if norm not in ("MABN", "BN") and architecture not in ("Mask R-CNN", "RetinaNet"):
        pytest.skip("the norm is tried on two architectures")
    model = build_tiny(architecture, norm)
    folded = fold(model)
    stay = left(model)
    if architecture in ("RetinaNet", "FCOS") and norm != "FrozenBN":
        assert len(stay) == 8
        assert all("shared by 5 feature levels" in reason for reason in stay.values())
        assert sum(isinstance(m, ChannelAffine) for m in folded.modules()) == 8 * 5
    else:
        assert stay == {}
    assert not any(isinstance(m, CentralizedKernel) for m in folded.modules())
    backbone, x = copy.deepcopy(model.backbone).double(), torch.randn(1, 3, SIZE, SIZE).double()
    with torch.no_grad():
        features = fold(backbone)(x)
        for level, expected in backbone(x).items():
            assert relative_error(features[level], expected) < 1e-11
        expected, got = dict(tensors(model(images()))), dict(tensors(folded(images())))
    assert expected and set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        if value.dtype == torch.bool:  # masks, cut off at a score
            assert (got[name] != value).float().mean() < 0.01
        else:  # what is decoded of logits and deltas magnifies their rounding
            assert relative_error(got[name].float(), value.float()) < 1e-4, name


@pytest.mark.parametrize("norm", ["MABN", "BN"])
def test_each_level_of_retinanet_can_have_its_own_kernel(norm):
    model = build_tiny("RetinaNet", norm)
    folded = fold(model, per_level=True)
    assert not any(isinstance(m, (CycleBatchNormList, ChannelAffine)) for m in folded.modules())
    assert sum(isinstance(m, InTurn) for m in folded.modules()) == 8
    features = [torch.randn(1, 16, n, n) for n in (8, 4, 2, 1, 1)]
    for _ in range(2):
        for got, expected in zip(folded.head(features), model.head(features)):
            for a, b in zip(got, expected):
                assert relative_error(a, b) < 1e-5


class NoEvaluator(DatasetEvaluator):
    """Counts images."""

    def __init__(self):
        self.count = 0

    def process(self, inputs, outputs):
        self.count += len(outputs)


def test_the_trainer_evaluates_a_folded_copy(tmp_path):
    make_synthetic_coco(tmp_path, layout="shapes", train=1, val=2, size=SIZE)
    cfg = cfg_for(tmp_path, tmp_path / "output")
    model = Trainer.build_model(cfg)
    called = []
    for name, module in model.named_modules():
        if isinstance(module, MABN2d):
            module.register_forward_pre_hook(lambda m, args, name=name: called.append(name))
    name = "two_images"
    register_coco_instances(
        name,
        {},
        str(tmp_path / "shapes/annotations/instances_val.json"),
        str(tmp_path / "shapes/val"),
    )
    cfg.DATASETS.TEST = (name,)
    evaluator = NoEvaluator()
    try:
        Trainer.test(cfg, model, [evaluator])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert evaluator.count == 2
    assert called == [] and sum(isinstance(m, MABN2d) for m in model.modules()) == 32
