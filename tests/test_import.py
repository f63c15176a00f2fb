"""Weights of BN, of affine maps and of no norm in models of this package: the function stays what it is."""

import logging
import pickle
import re
import warnings

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.layers.batch_norm import CycleBatchNormList
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import nn

import mabn_d2
from mabn_d2 import BRN2d, CenConv2d, MABN2d, MBN2d
from mabn_d2.checkpoint import Checkpointer
from mabn_d2.data import make_synthetic_coco
from mabn_d2.deploy import ExportedDetector, export_detector
from mabn_d2.engine import Trainer
from mabn_d2.surgery import measure_statistics

from .helpers.models import small_cfg
from .helpers.runs import cfg_for, weights
from .helpers.settled import measure, relative_error, settle
from .helpers.workers import run_workers


def detector(backbone, rest):
    """A Mask R-CNN in float64."""
    cfg = small_cfg(rest, "MODEL.RESNETS.NORM", backbone)
    return build_model(cfg).double().eval()


@torch.no_grad()
def trained(model, statistics=True, dead=True):
    """No value is the one that training began with; channels are dead, in three ways, if they may be."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "bias", None) is not None and module.weight.dim() > 1:
            module.bias.uniform_(-0.1, 0.1)
    settle(model)
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    outputs(model)
    for handle in handles:
        handle.remove()
    for module in norms:
        if dead:
            module.weight[0] = 0
            module.running_var[1], module.running_var[2] = 1e-12, 0.0
            module.weight[1:3] *= 1e-3  # as weight decay leaves it
        if not statistics:
            module.weight *= (module.running_var + module.eps).rsqrt()
            module.bias -= module.weight * module.running_mean
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    return model


def outputs(model):
    """Everything that a detector predicts, of given boxes, so that nothing depends on which ones are kept."""
    if isinstance(model, nn.Sequential):
        return {"out": model(torch.linspace(-1, 1, 4 * 3 * 256).view(4, 3, 16, 16).double())}
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = model.backbone(images)
    heads = model.roi_heads
    pooled = [features[name] for name in heads.box_in_features]
    boxes = [Boxes(torch.tensor([[4.0, 4, 36, 40], [20, 16, 60, 60], [0, 0, 60, 30]]))] * 2
    scores, deltas = heads.box_predictor(heads.box_head(heads.box_pooler(pooled, boxes)))
    masks = heads.mask_head.layers(heads.mask_pooler(pooled, boxes))
    return {**features, "scores": scores, "deltas": deltas, "masks": masks}


@torch.no_grad()
def assert_same_outputs(model, source, tolerance=1e-9):
    expected = outputs(source.eval())
    for name, out in outputs(model.eval()).items():
        assert expected[name].std() > 0
        assert relative_error(out, expected[name]) < tolerance, name


def load(model, path, caplog=None, **options):
    Checkpointer(model, **options).load(str(path))
    return (
        [r.getMessage() for r in caplog.records if r.name.startswith("mabn_d2")] if caplog else []
    )


@pytest.mark.parametrize("ours", ["MABN", "BRN", "MBN"])
@pytest.mark.parametrize("backbone, rest", [("FrozenBN", ""), ("BN", "BN"), ("BN", "")])
def test_a_coco_detector_finds_the_same_boxes_and_masks_before_training(
    backbone, rest, ours, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    source, model = trained(detector(backbone, rest)), detector(ours, ours)
    Checkpointer(source, str(tmp_path)).save("model_final")
    said = load(model, tmp_path / "model_final.pth", caplog)
    assert_same_outputs(model, source)
    assert not any("another norm" in message for message in said)
    counted = backbone == "BN" and ours == "BRN"  # nothing is to be done there
    if not counted:
        (line,) = [message for message in said if "is kept" in message]
        assert "the function of 20 norms" in line if rest == "" else "0 affine maps" in line


@pytest.mark.parametrize("ours", ["MABN", "BRN"])
@pytest.mark.parametrize(
    "norm, version, counts", [("BN", 1, False), ("BN", 2, True), ("FrozenBN", 3, False)]
)
@pytest.mark.parametrize("checkpointer", [Checkpointer, DetectionCheckpointer])
def test_files_of_every_version_of_bn_are_imported(
    norm, version, counts, ours, checkpointer, tmp_path
):
    """BN of PyTorch before 0.4.1, BN since then, which counts, and Detectron2's FrozenBN."""
    source, model = trained(detector(norm, norm), dead=False), detector(ours, ours)
    for module in source.modules():
        if isinstance(getattr(module, "num_batches_tracked", None), torch.Tensor):
            module.num_batches_tracked.fill_(7)
    state = source.state_dict()
    name = "backbone.bottom_up.stem.conv1.norm"
    if version == 1:
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]
        for metadata in state._metadata.values():
            metadata["version"] = 1
    assert state._metadata[name]["version"] == version
    assert (f"{name}.num_batches_tracked" in state) == counts
    torch.save({"model": state}, tmp_path / "model.pth")
    checkpointer(model).load(str(tmp_path / "model.pth"))
    assert_same_outputs(model, source)
    if ours == "BRN" and checkpointer is Checkpointer:  # a file that counts may be a BRN's own
        brn = model.get_submodule(name)
        assert brn.num_batches_tracked == (7 if counts else brn.r_max_iters[1])


def test_a_frozen_bn_of_version_1_is_not_told_from_gn(tmp_path, caplog):
    """It held no statistics, and its file does not say of what its γ and β are."""
    state = trained(detector("FrozenBN", "FrozenBN"), statistics=False).state_dict()
    for key in [key for key in state if "running" in key]:
        del state[key]
    torch.save({"model": state}, tmp_path / "model.pth")
    said = load(detector("MABN", "MABN"), tmp_path / "model.pth", caplog)
    (warning,) = [message for message in said if "another norm" in message]
    assert re.search(r"GN for \d+ layers that have MABN", warning)


def test_what_has_no_counterpart_is_listed_by_name(tmp_path, caplog):
    """Two fully-connected layers into four convolutions and one."""

    def build(norm, convolutions, layers):
        head = ("MODEL.ROI_BOX_HEAD.NUM_CONV", convolutions, "MODEL.ROI_BOX_HEAD.NUM_FC", layers)
        return build_model(small_cfg(norm, "MODEL.RESNETS.NORM", norm or "FrozenBN", *head))

    Checkpointer(build("", 0, 2), str(tmp_path)).save("model")
    caplog.set_level(logging.INFO)
    load(build("MABN", 4, 1), tmp_path / "model.pth")
    unused, missing = "are not used by the model", "are not found in the checkpoint"
    said = {
        words: record.getMessage() for record in caplog.records for words in (unused, missing)
        if words in record.getMessage()
    }  # fmt: skip
    assert "roi_heads.box_head.fc2." in said[unused] and "conv" not in said[unused]
    for number in range(1, 5):
        assert f"roi_heads.box_head.conv{number}." in said[missing]
    assert "fc1" not in said[missing] and "backbone" not in said[missing]


def test_a_frozen_bn_that_was_an_affine_map_is_told_by_its_statistics(tmp_path):
    """As Detectron2's zoo has it, where detectors started from Caffe2's weights."""
    source = trained(detector("FrozenBN", ""), statistics=False)
    Checkpointer(source, str(tmp_path)).save("model")
    model = detector("MABN", "MABN")
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "model.pth"))
    assert_same_outputs(model, source)
    norms = [name for name, module in model.named_modules() if isinstance(module, MABN2d)]
    assert sorted(checkpointer.unmeasured) == sorted(norms)


def write_msra(model, path):
    """The backbone of a model as Caffe2's file: affine maps, and the momentum of training."""
    blobs = {}
    for name, value in model.backbone.bottom_up.state_dict().items():
        name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
        for ours, theirs in [
            ("shortcut", "branch1"),
            ("conv1.", "branch2a."),
            ("conv2", "branch2b"),
        ]:
            name = (
                name.replace(ours, theirs)
                if name.startswith("res") and "_conv1" not in name
                else name
            )
        name = (
            name.replace(".norm", "_bn").replace("_bn.weight", "_bn_s").replace("_bn.bias", "_bn_b")
        )
        name = name.replace(".weight", "_w").replace(".", "_")
        if "running" not in name and "tracked" not in name:
            blobs[name] = blobs[f"{name}_momentum"] = value.float().numpy()
    with open(path, "wb") as f:
        pickle.dump({"blobs": blobs, "cfg": "MODEL: {}"}, f, protocol=2)


@pytest.mark.parametrize("norm", ["MABN", "BRN", "MBN"])
def test_msra_weights_have_the_features_of_frozen_bn(norm, tmp_path):
    source, model = trained(detector("FrozenBN", ""), statistics=False), detector(norm, norm)
    write_msra(source, tmp_path / "R-18.pkl")  # in float32
    source.float().double()
    for module in source.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(1 - module.eps)
    load(model, tmp_path / "R-18.pkl")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = source.backbone.bottom_up(images)
    for mode in (False, True) if norm == "MABN" else (False,):
        features = model.train(mode).backbone.bottom_up(images)
        for name, feature in features.items():
            assert relative_error(feature, expected[name]) < 1e-9


def test_the_training_mode_forward_of_mabn_is_the_evaluation_of_the_source(tmp_path):
    source = trained(detector("FrozenBN", ""), dead=False)
    Checkpointer(source, str(tmp_path)).save("model")
    model = detector("MABN", "MABN")
    load(model, tmp_path / "model.pth")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = source.backbone(images)
    for name, feature in model.train().backbone(images).items():
        assert relative_error(feature, expected[name]) < 1e-9


@pytest.mark.parametrize("ours", ["FrozenBN", "BN", "BRN", "MBN"])
def test_a_mabn_detector_becomes_one_of_bn(ours, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source, model = trained(detector("MABN", "MABN")), detector(ours, ours)
    Checkpointer(source, str(tmp_path)).save("model")
    said = load(model, tmp_path / "model.pth", caplog)
    assert_same_outputs(model, source)
    assert not any("another norm" in message for message in said)


def test_as_is_loads_by_name_and_warns(tmp_path, caplog):
    Checkpointer(trained(detector("BN", "")), str(tmp_path)).save("model")
    model = detector("MABN", "MABN")
    said = load(model, tmp_path / "model.pth", caplog, weights_import="as_is")
    assert sum("another norm" in message for message in said) == 2  # BN and none
    stem = model.backbone.bottom_up.stem.conv1
    assert not stem.kernel_mean.any() and not stem.norm.running_mean.any()
    model = detector("MABN", "MABN")
    for how in ("as_is", "adapt"):
        caplog.clear()
        checkpointer = Checkpointer(model, weights_import=how)
        checkpointer.load(str(tmp_path / "model.pth"))
        checkpointer.log_evaluation_only()
        warned = [
            r for r in caplog.records if "'adapt' is 'as_is' without training" in r.getMessage()
        ]
        assert len(warned) == (how == "adapt")
    with pytest.raises(
        ValueError, match="'exactly' is not known, accepted are 'exact', 'adapt', 'as_is'"
    ):
        Checkpointer(model, weights_import="exactly")


# --------------------------------------------------------------------------- in a stock script


def test_a_stock_script_imports_files_with_statistics_exactly(tmp_path, shapes):
    source = trained(detector("BN", "BN"), dead=False).float()
    DetectionCheckpointer(source, str(tmp_path)).save("model")
    options = ("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "SOLVER.MAX_ITER", "1")
    trainer = DefaultTrainer(cfg_for(shapes, tmp_path / "out", *options, "DATASETS.TEST", "()"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.resume_or_load(resume=False)
    model = trainer.model.double()
    assert_same_outputs(model, source.double(), 1e-5)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = source.backbone(images)
    for name, feature in model.train().backbone(images).items():
        assert relative_error(feature, expected[name]) < 1e-5
    trainer.model.float()
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_stock_script_says_what_it_loads_as_it_is(tmp_path):
    for rest, message in [("", "affine map, of GN or of no norm"), ("GN", "affine map, of GN")]:
        source, model = trained(detector("FrozenBN", rest)), detector("MABN", "MABN")
        DetectionCheckpointer(source, str(tmp_path)).save(f"model{rest}")
        with pytest.warns(UserWarning, match=message):
            DetectionCheckpointer(model).load(str(tmp_path / f"model{rest}.pth"))
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = source.backbone.bottom_up(images)  # which has statistics
        for name, feature in model.eval().backbone.bottom_up(images).items():
            assert relative_error(feature, expected[name]) < 1e-9
        assert not model.backbone.fpn_lateral2.kernel_mean.any()


def test_beside_its_convolution_a_norm_says_that_it_loads_bn_as_it_is():
    model = network(MABN2d)
    with pytest.warns(UserWarning, match="which convolution feeds it is not told"):
        model.load_state_dict(trained(network(nn.BatchNorm2d)).state_dict(), strict=False)
    assert not model[0].kernel_mean.any() and not model[1].running_mean.any()


# ------------------------------------------------------------------------------------- from_bn


def network(norm, eps=1e-5, bias=False):
    def convolution(*sizes):
        return (CenConv2d if norm is MABN2d else nn.Conv2d)(*sizes, bias=bias)

    return nn.Sequential(
        convolution(3, 8, 3), norm(8, eps=eps) if norm else nn.Identity(), nn.ReLU(),
        convolution(8, 8, 3), norm(8, eps=eps) if norm else nn.Identity(),
    ).double()  # fmt: skip


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("own_eps", [1e-5, 1e-3])
@pytest.mark.parametrize("norm", [MABN2d, BRN2d, MBN2d])
def test_every_eps_and_dead_channels(norm, own_eps, eps):
    source = trained(network(nn.BatchNorm2d, eps)).eval()
    if norm is BRN2d:
        source = {k: v for k, v in source.state_dict().items() if "tracked" not in k}
        reference = network(nn.BatchNorm2d, eps).eval()
        reference.load_state_dict(source, strict=False)
    else:
        reference = source
    model = network(norm, own_eps).eval()
    mabn_d2.from_bn(model, source, eps=eps)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference(images))


def test_from_bn_measures_what_the_source_does_not_hold():
    torch.manual_seed(0)
    source = trained(network(None, bias=True)).eval()
    state = source.state_dict()
    batches = [3 + torch.randn(4, 3, 16, 16, dtype=torch.float64) for _ in range(3)]
    model = network(MABN2d)
    imported = mabn_d2.from_bn(model, state, batches)
    assert imported.affine == ["1", "4"] and not imported.with_statistics
    images = torch.cat(batches)
    torch.testing.assert_close(model.eval()(images), source(images))
    x = model[0](images)
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)))
    var = x.var((0, 2, 3), unbiased=False) - model[1].eps
    torch.testing.assert_close(model[1].running_var, var + model[1].eps)
    torch.testing.assert_close(model.train()(images), source(images))  # the first training step


class HeadOfLevels(nn.Module):
    """Of the kind of RetinaNet's: one convolution, one norm per feature level, γ and β shared."""

    def __init__(self, norm):
        super().__init__()
        convolution = CenConv2d(3, 8, 3, bias=False) if norm else nn.Conv2d(3, 8, 3)
        levels = CycleBatchNormList(2, norm, num_features=8) if norm else nn.Identity()
        self.tower = nn.Sequential(convolution, levels, nn.ReLU()).double()

    def forward(self, features):
        return [self.tower(feature) for feature in features]


def test_norms_per_feature_level_that_share_their_parameters_keep_the_function():
    torch.manual_seed(0)
    source, model = HeadOfLevels(None), HeadOfLevels(MABN2d)
    images = [2 + torch.randn(4, 3, 16, 16).double(), -1 + 3 * torch.randn(4, 3, 8, 8).double()]
    imported = mabn_d2.from_bn(model, source.state_dict(), [(images)])
    assert imported.affine == ["tower.1"]
    first, second = model.tower[1]
    x = [model.tower[0](image) for image in images]
    means = torch.stack([level.mean((0, 2, 3)) for level in x])
    torch.testing.assert_close(first.running_mean, means.mean(0))
    assert torch.equal(first.running_var, second.running_var) and first.running_mean.std() > 0
    for mode in (False, True):
        for got, expected in zip(model.train(mode)(images), source(images)):
            torch.testing.assert_close(got, expected)


def test_a_norm_that_saw_nothing_stays_what_it_was():
    model = network(MABN2d)
    mabn_d2.from_bn(model, network(None, bias=True).state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert measure_statistics(model, ["1", "4"], []) == ["1", "4"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# ------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, layout="shapes", train=20, val=4, size=64)
    return folder


@pytest.mark.parametrize("how", ["exact", "adapt"])
def test_statistics_are_measured_before_training_and_not_again(how, tmp_path, shapes, monkeypatch):
    monkeypatch.setattr("mabn_d2.engine.resumable.STATISTICS_ITERS", 3)
    write_msra(trained(detector("FrozenBN", ""), statistics=False), tmp_path / "R-18.pkl")
    options = ("MODEL.WEIGHTS", str(tmp_path / "R-18.pkl"), "MODEL.WEIGHTS_IMPORT", how)
    states = []
    for run in ("a", "b"):
        torch.manual_seed(0)  # of the initialization
        trainer = Trainer(cfg_for(shapes, tmp_path / run, *options))
        trainer.resume_or_load(resume=True)
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    stem = trainer.model.backbone.bottom_up.stem.conv1.norm
    assert stem.running_mean.any() == (how == "exact")
    assert not torch.equal(stem.running_var, torch.ones_like(stem.running_var))
    trainer.checkpointer.save("model_0000000", iteration=0)
    resumed = Trainer(cfg_for(shapes, tmp_path / "b", *options))
    monkeypatch.setattr(Trainer, "_estimate_statistics", None)
    resumed.resume_or_load(resume=True)
    for key, value in states[1].items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def measure_on_a_worker(state):
    model = network(MABN2d)
    images = torch.randn(2 + comm.get_rank(), 3, 16, 16, dtype=torch.float64)
    images += comm.get_rank()
    mabn_d2.from_bn(model, state, [images])
    return images, model.state_dict()


@pytest.mark.slow
def test_measured_statistics_are_those_of_the_images_of_all_workers(tmp_path):
    state = trained(network(None, bias=True)).state_dict()
    results = run_workers(2, measure_on_a_worker, tmp_path, state)
    (_, model), (_, other) = results
    for key, value in model.items():
        assert torch.equal(value, other[key]), key
    convolution = nn.Conv2d(3, 8, 3, bias=False).double()
    convolution.weight.data.copy_(state["0.weight"])
    x = convolution(torch.cat([images for images, _ in results]))
    torch.testing.assert_close(model["1.running_mean"], x.mean((0, 2, 3)))
    torch.testing.assert_close(model["1.running_var"], x.var((0, 2, 3), unbiased=False))


@pytest.mark.slow
def test_a_resumed_run_and_an_exported_model_carry_shift_and_m0(tmp_path, shapes):
    Checkpointer(trained(detector("BN", "BN"), dead=False).float(), str(tmp_path)).save("bn")
    options = ("MODEL.WEIGHTS", str(tmp_path / "bn.pth"), "DATASETS.TEST", "()")

    def trainer(output):
        made = Trainer(cfg_for(shapes, tmp_path / output, *options, "SOLVER.MAX_ITER", "4"))
        made.resume_or_load(resume=True)
        return made

    whole = trainer("whole")
    stem = whole.model.backbone.bottom_up.stem.conv1
    imported = {"kernel_mean": stem.kernel_mean.clone(), "shift": stem.norm.running_mean.clone()}
    assert all(value.any() for value in imported.values())
    whole.train()
    stopped = trainer("stopped")
    stopped.max_iter = 2
    stopped.train()
    resumed = trainer("stopped")
    assert resumed.start_iter == 2
    resumed.train()
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[key]), key
    stem = resumed.model.backbone.bottom_up.stem.conv1
    assert torch.equal(stem.kernel_mean, imported["kernel_mean"])
    assert torch.equal(stem.norm.running_mean, imported["shift"])

    model = resumed.model.eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    inputs = [{"image": 255 * torch.rand(3, 64, 64)}]
    export_detector(model, tmp_path / "model.ts", "tracing", inputs[0]["image"])

    @torch.no_grad()
    def scores(detector):
        return detector(inputs)[0]["instances"].scores

    right = scores(model)
    assert len(right) > 10
    assert relative_error(scores(ExportedDetector(tmp_path / "model.ts")), right) < 1e-4
    for module in model.modules():
        if isinstance(module, CenConv2d):
            module.kernel_mean.zero_()
    wrong = scores(model)
    assert len(wrong) != len(right) or relative_error(wrong, right) > 1e-2
