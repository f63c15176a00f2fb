"""Exported files: they run without this package and find what the model finds."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch

from mabn_d2 import MABN2d, convert
from mabn_d2.data import make_synthetic_coco
from mabn_d2.deploy import ExportedDetector, export_detector
from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config

from .helpers import CONFIGS, INSTANT, ROOT
from .helpers.runs import environment
from .helpers.settled import relative_error, settle

needs_onnx = pytest.mark.skipif(
    not (find_spec("onnx") and find_spec("onnxruntime")), reason="onnx or onnxruntime is missing"
)
TINY = {
    "mask_rcnn": (INSTANT, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]),
    "retinanet": (
        CONFIGS / "COCO-Detection/scratch_retinanet_R_50_FPN_2x_mabn.yaml",
        ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
         "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NUM_CLASSES", 3,
         "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0],
    ),
}  # fmt: skip
FORMATS = ["tracing", pytest.param("onnx", marks=needs_onnx)]


def image(height, width, seed=0):
    return 255 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=TINY)
def detector(request):
    torch.manual_seed(0)
    file, options = TINY[request.param]
    options = [
        "MODEL.WEIGHTS",
        "",
        "MODEL.DEVICE",
        "cpu",
        "TEST.DETECTIONS_PER_IMAGE",
        10,
        *options,
    ]
    model = Trainer.build_model(load_config(str(file), options))
    return settle(model, inputs=[dict(image=image(96, 96))])


def assert_same_detections(got, expected):
    """Detections above a score of 0.05 match one to one."""
    keep = [(d.scores > 0.05) for d in (got, expected)]
    assert keep[0].sum() == keep[1].sum()
    got, expected = got[keep[0]], expected[keep[1]]
    assert torch.equal(got.pred_classes, expected.pred_classes)
    if len(expected) > 0:
        assert relative_error(got.scores, expected.scores) < 1e-3
        assert (got.pred_boxes.tensor - expected.pred_boxes.tensor).abs().max() < 0.1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("norm", ["MABN", "BN"])
def test_an_exported_detector_finds_what_the_model_finds(detector, format, norm, tmp_path):
    convert(detector, norm)
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.ts")
    export_detector(detector, path, format, image(128, 160))
    exported = ExportedDetector(path)
    found = 0
    for height, width in [(128, 160), (96, 200)]:
        inputs = [dict(image=image(height, width, 1), height=2 * height, width=2 * width)]
        with torch.no_grad():
            expected = detector(inputs)[0]["instances"]
        assert_same_detections(exported(inputs)[0]["instances"], expected)
        found += (expected.scores > 0.05).sum()
    assert found > 0
    assert any(isinstance(m, MABN2d) for m in detector.modules()) == (norm == "MABN")


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_without_detections_gives_none(detector, format, tmp_path):
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.box_predictor.test_score_thresh = 1.1
    else:
        detector.test_score_thresh = 1.1
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.ts")
    export_detector(detector, path, format, image(128, 160))
    assert len(ExportedDetector(path)([dict(image=image(128, 160))])[0]["instances"]) == 0


@pytest.mark.skipif(find_spec("detectron2._C") is None, reason="Detectron2 without _C")
def test_a_detector_is_scripted(tmp_path):
    torch.manual_seed(0)
    file, options = TINY["mask_rcnn"]
    model = Trainer.build_model(load_config(str(file), ["MODEL.WEIGHTS", "", *options]))
    settle(model, inputs=[dict(image=image(96, 96))])
    export_detector(model, tmp_path / "model.ts", "scripting", image(128, 160))
    (got,) = torch.jit.load(str(tmp_path / "model.ts"))(({"image": image(96, 200)},))
    with torch.no_grad():
        expected = model.inference([dict(image=image(96, 200))], do_postprocess=False)[0]
    assert relative_error(got["scores"], expected.scores) < 1e-3


@needs_onnx
def test_the_file_holds_no_norm_and_runs_without_torch_and_without_this_package(detector, tmp_path):
    import onnx

    path = tmp_path / "model.onnx"
    export_detector(detector, path, "onnx", image(128, 160))
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    norms = {"BatchNormalization", "InstanceNormalization", "GroupNormalization", "ReduceMean"}
    assert "Conv" in kinds and not kinds & norms
    program = f"""
        import sys
        sys.path[:] = {sys.path!r}
        sys.modules["torch"] = sys.modules["mabn_d2"] = None
        import numpy, onnxruntime
        session = onnxruntime.InferenceSession({str(path)!r})
        outputs = session.run(None, {{"image": numpy.zeros((3, 64, 96), "float32")}})
        assert outputs[-1].tolist() == [64, 96]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_what_cannot_be_exported_is_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(ValueError, match="Linear cannot be exported, accepted are GeneralizedRCNN"):
        export_detector(torch.nn.Linear(1, 1), tmp_path / "model.onnx", "onnx", image(8, 8))
    assert list(tmp_path.iterdir()) == []


def test_the_tool_exports_and_compares_the_ap(tmp_path):
    make_synthetic_coco(tmp_path, layout="shapes", train=1, val=2, size=64)
    model = Trainer.build_model(load_config(str(INSTANT), ["MODEL.WEIGHTS", ""]))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    command = [
        sys.executable, str(ROOT / "tools/export_model.py"), "--config-file", str(INSTANT),
        "--format", "tracing", "--output", str(tmp_path / "model.ts"), "--evaluate",
        "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "OUTPUT_DIR", str(tmp_path / "output"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.ts is written" in done.stdout
    lines = [line for line in done.stdout.splitlines() if " AP: model " in line]
    assert len(lines) == 2
    for line in lines:  # "shapes_val bbox AP: model 0.00, /tmp/model.ts 0.00"
        of_model, of_file = line.split("AP: ")[1].split(", ")
        assert of_model.split()[-1] == of_file.split()[-1]
