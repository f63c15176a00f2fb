import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from mabn_d2 import MABN2d, add_mabn_config, centralize
from mabn_d2 import checkpoint as weights
from mabn_d2.checkpoint import Checkpointer
from mabn_d2.checkpoint.sources.release import convert_release
from mabn_d2.checkpoint.sources.torchvision import convert_torchvision
from mabn_d2.checkpoint.sources.weights import FOREIGN_NORM_NOTE
from mabn_d2.ops import record_and_average
from mabn_d2.plugin import load_config

from .helpers import INSTANT, load_tool

# -------------------------------------------------------------------------------------- the tools


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the command line; returns its exit status, output and errors."""

    def run(*arguments):
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["convert_weights.py", *arguments])
        status = load_tool("convert_weights").main()
        return (status, *capsys.readouterr())

    return run


def small_config(*options):
    cfg = load_config(str(INSTANT))
    cfg.merge_from_list(list(options))
    return cfg


def randomize(model):
    """Random affine parameters and statistics, such that each of them changes the output."""
    for name, tensor in model.state_dict().items():
        if name.endswith("count"):
            tensor.fill_(5003)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.dim() == 1 or name.endswith("values"):
            tensor.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.running_mean.zero_()  # the shift, which the release does not have
    return model.eval()


def release_state(state_dict):
    """The state of a model with MABN2d under the names, and in the shapes, of the release."""
    released = {}
    for key, value in state_dict.items():
        if key.endswith("second_moment.count"):
            released[key.replace("second_moment.count", "iters")] = value.reshape(1)
        elif key.endswith("second_moment.values"):
            released[key.replace("second_moment.values", "buffer_x2")] = value.roll(1, 0)
        elif key.endswith("psi.values"):
            released[key.replace("psi.values", "buffer_gz")] = value.roll(1, 0)
        elif key.endswith("running_var"):
            released[key] = value.reshape(1, -1, 1, 1)
        elif not key.endswith(("psi.count", "running_mean", "kernel_mean")):
            released[key] = value
    return released


def mabn_resnet():
    model = torchvision.models.resnet18(norm_layer=MABN2d, num_classes=3)
    assert all(site.centralized for site in centralize(model))
    return randomize(model)


def stages_of(resnet, images):
    """Outputs of the stages of torchvision's ResNet."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
    outputs = {}
    for stage in range(1, 5):
        x = outputs[f"res{stage + 1}"] = getattr(resnet, f"layer{stage}")(x)
    return outputs


@torch.no_grad()
def assert_same_backbone(resnet, path, lines):
    """The file and the config that the tool gives make the same backbone as `resnet`."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    part = Path(path).with_suffix(".yaml")
    part.write_text(lines + "\nVERSION: 2\n")
    cfg.merge_from_file(str(part))
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DEVICE", "cpu",
                         "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
                         "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
                         "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.IN_FEATURES", ["p2", "p3"],
                         "MODEL.META_ARCHITECTURE", "ProposalNetwork"])  # fmt: skip
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    images = torch.randn(1, 3, 64, 96)
    outputs = model.backbone.bottom_up(images)
    for name, expected in stages_of(resnet, images).items():
        error = (outputs[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name
    return model


def foreign_warnings(caplog):
    return [r for r in caplog.records if "weights of another norm" in r.getMessage()]


# -------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name, options", [
    ("resnet18", {}), ("resnet50", {"groups": 2, "width_per_group": 8}),
])  # fmt: skip
def test_torchvision_models_give_the_same_features(convert, tmp_path, name, options):
    source = randomize(getattr(torchvision.models, name)(num_classes=3, **options))
    torch.save(source.state_dict(), tmp_path / "src.pth")
    destination = tmp_path / "dst.pth"
    status, out, _ = convert(tmp_path / "src.pth", destination, "--from", "torchvision")
    assert status == 0
    assert FOREIGN_NORM_NOTE in out
    lines = re.search(r"config:\n(.*?)\n\n", out, flags=re.S)[1]
    assert "PIXEL_STD: [58.395, 57.12, 57.375]" in lines and "FORMAT: RGB" in lines
    model = assert_same_backbone(source, destination, lines)
    assert model.backbone.bottom_up.stem.conv1.norm.num_batches_tracked == 7


@pytest.mark.parametrize("stock", [True, False])
def test_weights_of_bn_become_those_of_mabn_without_a_model(convert, tmp_path, caplog, stock):
    source = randomize(torchvision.models.resnet18(num_classes=3))
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    torch.save(source.state_dict(), tmp_path / "src.pth")
    destination = tmp_path / "dst.pth"
    options = ("--from", "torchvision", "--norm", "MABN")
    status, out, _ = convert(tmp_path / "src.pth", destination, *options)
    assert status == 0 and "norm MABN" in out and FOREIGN_NORM_NOTE not in out
    model = build_model(small_config("MODEL.RESNETS.STRIDE_IN_1X1", False)).eval()
    (DetectionCheckpointer if stock else Checkpointer)(model).load(str(destination))
    assert not foreign_warnings(caplog)
    images = torch.randn(2, 3, 64, 64)
    x = source.maxpool(source.relu(source.bn1(source.conv1(images))))
    expected = source.layer4(source.layer3(source.layer2(source.layer1(x))))
    features = model.backbone.bottom_up(images)["res5"]
    assert (features - expected).norm() < 1e-5 * expected.norm()


def test_weights_without_statistics_are_not_converted_without_training_data(convert, tmp_path):
    source = torchvision.models.resnet18(num_classes=3)  # mean 0 and variance 1 are none
    torch.save(source.state_dict(), tmp_path / "src.pth")
    options = ("--from", "torchvision", "--norm", "MABN")
    status, _, error = convert(tmp_path / "src.pth", tmp_path / "dst.pth", *options)
    assert status == 2 and "src.pth holds norms without statistics" in error
    assert not (tmp_path / "dst.pth").exists()


def test_torchvision_names_with_mabn_of_this_package(tmp_path, caplog):
    resnet = mabn_resnet()
    state = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    converted = convert_torchvision({"state_dict": state, "epoch": 3}, "src.pth")
    assert converted.norm == "MABN" and not converted.notes and converted.left_over == ["epoch"]
    path = str(tmp_path / "dst.pth")
    weights.save_weights(converted, path)
    assert_same_backbone(resnet, path, weights.config_lines(converted, path))
    assert not foreign_warnings(caplog)


# --------------------------------------------------------------------------------- the MABN release


def test_release_classifier_gives_the_same_features(convert, tmp_path, caplog):
    resnet = mabn_resnet()
    state = {f"module.{k}": v for k, v in release_state(resnet.state_dict()).items()}
    assert state["module.bn1.running_var"].shape == (1, 64, 1, 1)
    source, destination = tmp_path / "src.pth", tmp_path / "dst.pth"
    torch.save({"model": state, "iteration": 3}, source)
    status, out, _ = convert(source, destination, "--from", "mabn-release")
    assert status == 0 and "left over: 1\n  iteration\n" in out
    for option in ("FORMAT: BGR", "PIXEL_MEAN: [0.0, 0.0, 0.0]", "STRIDE_IN_1X1: false"):
        assert option in out, option
    lines = re.search(r"config:\n(.*?)\n\n", out, flags=re.S)[1]
    model = assert_same_backbone(resnet, destination, lines)
    loaded = model.backbone.bottom_up.stem.conv1.norm.state_dict()
    for key, value in resnet.bn1.state_dict().items():
        assert torch.equal(loaded[key], value), key
    assert not foreign_warnings(caplog)


def test_release_classifier_norms_with_grouped_statistics():
    """The classifier's own norm: statistics of the last 16 groups, the oldest in the first row."""
    norm = {
        "weight": torch.ones(4), "bias": torch.zeros(4), "running_var": torch.rand(4),
        "sta_matrix": torch.ones(16, 32), "pre_x2": torch.rand(16, 4), "pre_gz": torch.rand(16, 4),
        "iters": torch.tensor([300.0]),
    }  # fmt: skip
    state = {f"bn1.{key}": value for key, value in norm.items()}
    state.update({"conv1.weight": torch.rand(4, 3, 7, 7), "layer1.0.conv1.weight": torch.rand(1)})
    converted = convert_release(state, "src.pth").state_dict
    ours = MABN2d(4)
    prefix = "stem.conv1.norm."
    ours.load_state_dict({k[len(prefix) :]: v for k, v in converted.items() if prefix in k})
    assert ours.psi.count == 300 * 16 and torch.equal(ours.psi.values, norm["pre_gz"])
    newest = torch.rand(4)
    ring = ours.second_moment
    # The newest takes the place of the oldest, as in the release's window.
    average = record_and_average(newest[None], ring.values, ring.count, 0)[0]
    assert torch.allclose(average, (norm["pre_x2"][1:].sum(0) + newest) / 16)


def test_norms_of_this_package_stay_what_they_are():
    state = mabn_resnet().state_dict()
    converted = convert_release(state, "src.pth").state_dict
    assert len(converted) == len(state)
    for tensor in ("running_var", "psi.count", "psi.values", "second_moment.values"):
        assert torch.equal(converted[f"stem.conv1.norm.{tensor}"], state[f"bn1.{tensor}"]), tensor


def test_statistics_without_moving_averages_start_them_anew(tmp_path, caplog):
    state = {k: v for k, v in release_state(mabn_resnet().state_dict()).items()
             if not k.endswith(("iters", "buffer_x2", "buffer_gz"))}  # fmt: skip
    path = str(tmp_path / "dst.pth")
    weights.save_weights(convert_release(state, "src.pth"), path)
    model = build_model(small_config())
    Checkpointer(model).load(path)
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert norm.psi.count == 0 and torch.equal(norm.running_var, state["bn1.running_var"].flatten())
    assert not foreign_warnings(caplog)


# Detectron2's module -> that of the release's detector, in the small model.
DETECTOR_MODULES = {
    "backbone.bottom_up.stem.conv1.norm": "backbone.body.stem.bn1",
    "backbone.bottom_up.stem.conv1": "backbone.body.stem.conv1",
    **{f"backbone.fpn_lateral{n + 1}.norm": f"backbone.fpn.fpn_inner{n}.1" for n in range(1, 5)},
    **{f"backbone.fpn_lateral{n + 1}": f"backbone.fpn.fpn_inner{n}.0" for n in range(1, 5)},
    **{f"backbone.fpn_output{n + 1}.norm": f"backbone.fpn.fpn_layer{n}.1" for n in range(1, 5)},
    **{f"backbone.fpn_output{n + 1}": f"backbone.fpn.fpn_layer{n}.0" for n in range(1, 5)},
    "proposal_generator.rpn_head.conv": "rpn.head.conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn.head.cls_logits",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.head.bbox_pred",
    "roi_heads.box_head.conv1.norm": "roi_heads.box.feature_extractor.xconvs.1",
    "roi_heads.box_head.conv1": "roi_heads.box.feature_extractor.xconvs.0",
    "roi_heads.box_head.conv2.norm": "roi_heads.box.feature_extractor.xconvs.4",
    "roi_heads.box_head.conv2": "roi_heads.box.feature_extractor.xconvs.3",
    "roi_heads.box_head.fc1": "roi_heads.box.feature_extractor.fc6",
    "roi_heads.box_predictor.cls_score": "roi_heads.box.predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box.predictor.bbox_pred",
    "roi_heads.mask_head.mask_fcn1.norm": "roi_heads.mask.feature_extractor.mask_fcn1.1",
    "roi_heads.mask_head.mask_fcn1": "roi_heads.mask.feature_extractor.mask_fcn1.0",
    "roi_heads.mask_head.mask_fcn2.norm": "roi_heads.mask.feature_extractor.mask_fcn2.1",
    "roi_heads.mask_head.mask_fcn2": "roi_heads.mask.feature_extractor.mask_fcn2.0",
    "roi_heads.mask_head.deconv": "roi_heads.mask.predictor.conv5_mask",
    "roi_heads.mask_head.predictor": "roi_heads.mask.predictor.mask_fcn_logits",
}


def release_detector(model):
    """The checkpoint that the release's code would have written of a Detectron2 model."""

    def name(key):
        for ours, theirs in DETECTOR_MODULES.items():
            if key.startswith(ours + "."):
                return theirs + key[len(ours) :]
        stage, rest = re.fullmatch(r"backbone\.bottom_up\.res(\d)\.(.+)", key).groups()
        rest = re.sub(r"conv(\d)\.norm", r"bn\1", rest)
        rest = rest.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        return f"backbone.body.layer{int(stage) - 1}.{rest}"

    state = release_state({name(key): value for key, value in model.state_dict().items()})
    for tensor in ("weight", "bias"):
        box, mask = "roi_heads.box.predictor.", "roi_heads.mask.predictor.mask_fcn_logits."
        state[f"{box}cls_score.{tensor}"] = state[f"{box}cls_score.{tensor}"].roll(1, 0)
        for key, rows in ((f"{box}bbox_pred.{tensor}", 4), (mask + tensor, 1)):
            background = torch.full_like(state[key][:rows], 99.0)
            state[key] = torch.cat([background, state[key]])
    state["rpn.anchor_generator.cell_anchors.0"] = torch.rand(3, 4)
    return {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}, "iteration": 9}


def test_release_detector_becomes_the_detector_it_was(convert, tmp_path, caplog):
    source = randomize(build_model(small_config()))
    torch.save(release_detector(source), tmp_path / "src.pth")
    destination = tmp_path / "dst.pth"
    status, out, _ = convert(tmp_path / "src.pth", destination, "--from", "mabn-release",
                             "--config-file", INSTANT)  # fmt: skip
    total = sum(not name.endswith("kernel_mean") for name in source.state_dict())
    assert status == 0
    assert f"takes {total} of its {total} tensors\n  misses: 0\n  leaves over: 0" in out
    assert "left over: 3\n" in out and "rpn.anchor_generator.cell_anchors.0" in out
    for option in ("PIXEL_MEAN: [102.9801, 115.9465, 122.7717]", "OFFSET: 0.5", "FORMAT: BGR",
                   "STRIDE_IN_1X1: true", "POOLER_TYPE: ROIAlign", "NUM_CLASSES: 6",
                   "NUM_CONV: 2", "TO_REMOVE"):  # fmt: skip
        assert option in out, option
    model = build_model(small_config())
    Checkpointer(model).load(str(destination))
    assert not foreign_warnings(caplog)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_class_order_of_the_release(tmp_path):
    checkpoint = release_detector(build_model(small_config()))
    predictor = "module.roi_heads.box.predictor."
    checkpoint["model"][predictor + "cls_score.bias"] = torch.arange(7.0)
    checkpoint["model"][predictor + "bbox_pred.bias"] = torch.arange(28.0)
    state = convert_release(checkpoint, "src.pth").state_dict
    assert state["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert state["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 28))
    assert len(state["roi_heads.mask_head.predictor.bias"]) == 6


# --------------------------------------------------------------------------------------- Detectron2


def test_detectron2_training_checkpoint_loses_its_trainer(convert, tmp_path, caplog):
    model = randomize(build_model(small_config()))
    trainer = {"iteration": 5, "_trainer": {"optimizer": {"state": {0: torch.rand(3)}}}}
    torch.save({"model": model.state_dict(), "trainer": trainer}, tmp_path / "src.pth")
    destination = tmp_path / "dst.pth"
    status, out, _ = convert(tmp_path / "src.pth", destination, "--from", "detectron2")
    assert status == 0 and "left over: 1\n  trainer\n" in out
    content = torch.load(destination)
    assert set(content) == {"model", "__author__"}
    assert all(torch.equal(content["model"][k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron2_model_zoo_pickle(tmp_path, protocol):
    arrays = {"stem.conv1.weight": np.random.rand(64, 3, 7, 7).astype("float32"),
              "stem.conv1.norm.running_mean": np.zeros(64, "float32")}  # fmt: skip
    model = {**arrays, "text": np.array(["text"], dtype=object)}
    zoo = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo, protocol=protocol))
    converted = weights.load_weights(str(tmp_path / "zoo.pkl"), "detectron2")
    assert converted.author == "torchvision" and converted.matching_heuristics
    assert converted.left_over == ["text"] and converted.config["INPUT"] == {"FORMAT": "RGB"}
    for key, array in arrays.items():
        assert np.array_equal(converted.state_dict[key].numpy(), array)


def test_caffe2_pickle_is_renamed_by_detectron2(tmp_path):
    model = build_model(small_config("MODEL.RESNETS.NORM", "BN"))
    blobs = {"conv1_w": np.random.rand(64, 3, 7, 7).astype("float32"),
             "res_conv1_bn_s": np.random.rand(64).astype("float32"),
             "conv1_w_momentum": np.zeros(3, "float32")}  # fmt: skip
    (tmp_path / "src.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    converted = weights.load_weights(str(tmp_path / "src.pkl"), "detectron2")
    assert converted.left_over == ["conv1_w_momentum"]
    weights.save_weights(converted, str(tmp_path / "dst.pth"))
    Checkpointer(model).load(str(tmp_path / "dst.pth"))
    stem = model.backbone.bottom_up.stem.conv1
    assert np.array_equal(stem.weight.detach().numpy(), blobs["conv1_w"])
    assert np.array_equal(stem.norm.weight.detach().numpy(), blobs["res_conv1_bn_s"])


# ------------------------------------------------------------------------------------ what can fail


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("source", weights.SOURCES)
def test_code_in_a_file_is_refused_and_not_executed(convert, tmp_path, suffix, source):
    file, trace = tmp_path / f"src.{suffix}", tmp_path / "executed"
    content = {"model": {"stem.conv1.weight": Malicious(trace)}}
    if suffix == "pth":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    status, out, error = convert(file, tmp_path / "dst.pth", "--from", source)
    assert status == 2 and out == "" and error.count("\n") == 1
    assert str(file) in error and "mkdir" in error
    assert sorted(os.listdir(tmp_path)) == [file.name]


def test_pickles_cannot_name_other_functions(tmp_path):
    for module, name in [("os", "system"), ("builtins", "eval"), ("numpy", "load"),
                         ("torch", "load"), ("numpy.core.multiarray", "fromfile")]:  # fmt: skip
        (tmp_path / "src.pkl").write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(ValueError, match=f"it contains {module}.{name}"):
            weights.read_checkpoint(str(tmp_path / "src.pkl"))


RESNET = {"conv1.weight": torch.rand(1), "layer1.0.conv1.weight": torch.rand(1)}
REFUSED = {
    "unknown names": ({"a.weight": torch.rand(1)}, None, "a.weight"),
    "empty": ({}, None, "found 0 entries"),
    "not a dictionary": ([1, 2], None, "list"),
    "no tensors": ({"model": {"conv1.weight": "text"}}, None, "found"),
    "bn as release": ({**RESNET, "bn1.running_mean": torch.rand(1)}, "mabn-release", "torchvision"),
    "release as bn": ({**RESNET, "bn1.iters": torch.rand(1)}, "torchvision", "mabn-release"),
    "release as detectron2": (
        {"model": {"backbone.body.stem.conv1.weight": torch.rand(1)}}, "detectron2", "accepted",
    ),
    "torchvision as detectron2": (RESNET, "detectron2", "conv1.weight"),
    "half a norm": (
        {**RESNET, "bn1.running_var": torch.rand(1, 4, 1, 1), "bn1.buffer_x2": torch.rand(16, 4)},
        "mabn-release", "bn1.{running_var, buffer_x2}",
    ),
    "no FPN": ({"backbone.body.stem.conv1.weight": torch.rand(1)}, "mabn-release", "without FPN"),
    "another head as release": (
        {**RESNET, "head.weight": torch.rand(1)}, "mabn-release", "head.weight",
    ),
    "another head as torchvision": (
        {**RESNET, "head.weight": torch.rand(1)}, "torchvision", "head.weight",
    ),
    "detr as detectron2": (
        {"model": {"backbone.0.body.conv1.weight": torch.rand(1)}}, "detectron2", "backbone.0.body",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_files_are_refused_in_one_line(convert, tmp_path, case):
    content, source, expected = REFUSED[case]
    torch.save(content, tmp_path / "src.pth")
    for source in [source] if source else weights.SOURCES:
        status, out, error = convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--from", source)
        assert status == 2 and out == "" and error.count("\n") == 1
        assert expected in error and "accepted" in error and str(tmp_path / "src.pth") in error
        assert not (tmp_path / "dst.pth").exists()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("source", weights.SOURCES)
def test_torchvisions_mask_rcnn_with_norms_in_the_heads_is_nobodys_file(
    convert, tmp_path, source, wrapped
):
    with torch.device("meta"):
        model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=3
        )
    state = {key: torch.zeros(2) for key in model.state_dict()}
    torch.save({"model": state} if wrapped else state, tmp_path / "src.pth")
    status, out, error = convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--from", source)
    assert status == 2 and out == "" and error.count("\n") == 1 and "accepted" in error
    assert not (tmp_path / "dst.pth").exists()


@pytest.mark.parametrize("name, content", [
    ("src.pth", b"no checkpoint"), ("src.pkl", b"no pickle"), ("src.pth", b""), ("src.pkl", b""),
])  # fmt: skip
def test_damaged_files_are_refused_in_one_line(convert, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    status, _, error = convert(tmp_path / name, tmp_path / "dst.pth", "--from", "detectron2")
    assert status == 2 and error.count("\n") == 1 and name in error


def test_truncated_and_missing_files(convert, tmp_path):
    torch.save(RESNET, tmp_path / "src.pth")
    content = (tmp_path / "src.pth").read_bytes()
    (tmp_path / "src.pth").write_bytes(content[: len(content) // 2])
    for name in ("src.pth", "missing.pth", "missing.pkl"):
        status, _, error = convert(tmp_path / name, tmp_path / "dst.pth", "--from", "torchvision")
        assert status == 2 and error.count("\n") == 1 and name in error


@pytest.mark.parametrize("destination, expected", [
    ("kept.pth", "exists"), ("new.pkl", "must end in .pth"), ("folder/new.pth", "folder"),
])  # fmt: skip
def test_destinations_that_are_refused(convert, tmp_path, destination, expected):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "src.pth")
    (tmp_path / "kept.pth").write_text("kept")
    status, _, error = convert(
        tmp_path / "src.pth", tmp_path / destination, "--from", "torchvision"
    )
    assert status == 2 and expected in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["kept.pth", "src.pth"]
    assert (tmp_path / "kept.pth").read_text() == "kept"


def test_a_failed_write_leaves_nothing(monkeypatch, tmp_path):
    def save(content, f):
        f.write(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", save)
    converted = weights.Weights({}, "nobody", False, [], {}, [])
    with pytest.raises(OSError, match="disk full"):
        weights.save_weights(converted, str(tmp_path / "dst.pth"))
    assert os.listdir(tmp_path) == []


def test_report_of_a_backbone_in_a_detector(convert, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    state = release_state(mabn_resnet().state_dict())
    state.update({"bn1.running_var": torch.rand(1, 32, 1, 1)})
    state.update({"bn1.buffer_x2": torch.rand(16, 32), "bn1.buffer_gz": torch.rand(16, 32)})
    state.update({"bn1.weight": torch.rand(32), "bn1.bias": torch.rand(32)})
    torch.save({"model": state, "epoch": 3}, tmp_path / "src.pth")
    status, out, _ = convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--from", "mabn-release",
                             "--config-file", INSTANT)  # fmt: skip
    assert status == 0 and "left over: 1\n  epoch\n" in out
    misses, leaves = re.search(r"misses: \d+\n(.*)leaves over: \d+\n(.*)config", out, re.S).groups()
    assert (
        "backbone.fpn_lateral2.norm.{weight, bias, running_mean, running_var, second_moment.values"
        in misses
    )
    assert "stem.fc.{bias, weight}" in leaves
    assert "bottom_up.stem.conv1.norm.{" in misses and "stem.conv1.norm.{" in leaves  # wrong shape


@pytest.mark.parametrize("content", ["MODEL: {NO_SUCH_KEY: 1}", "text", "MODEL: [", None])
def test_config_files_that_are_refused(convert, tmp_path, content):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "src.pth")
    if content is not None:
        (tmp_path / "cfg.yaml").write_text(content)
    status, _, error = convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--from", "torchvision",
                               "--config-file", tmp_path / "cfg.yaml")  # fmt: skip
    assert status == 2 and error.count("\n") == 1 and "cfg.yaml" in error
    assert not (tmp_path / "dst.pth").exists()
