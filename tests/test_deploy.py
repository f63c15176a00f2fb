"""Exported files: they run without this package and find what the model finds."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch
from detectron2.modeling import RetinaNet
from detectron2.structures import Boxes
from torch import nn

from mabn_d2 import MABN2d, convert, fold
from mabn_d2.data import make_synthetic_coco
from mabn_d2.deploy import ExportedDetector, export_detector
from mabn_d2.deploy.exporting import ONNX_OPSET
from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config

from .helpers import CONFIGS, INSTANT, ROOT, load_tool
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
FORMATS = ["tracing", "scripting", pytest.param("onnx", marks=needs_onnx)]


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


class Numbers(nn.Module):
    """What a detector computes before it selects: features, logits and deltas, and masks of a region."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, image, boxes):
        model, regions = self.model, [Boxes(boxes)]
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        if isinstance(model, RetinaNet):
            logits, deltas = model.head([features[name] for name in model.head_in_features])
            return (*features.values(), *logits, *deltas)
        proposals, heads = model.proposal_generator, model.roi_heads
        logits, deltas = proposals.rpn_head([features[name] for name in proposals.in_features])
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], regions)
        scores_and_deltas = heads.box_predictor(heads.box_head(pooled))
        masks = heads.mask_pooler([features[name] for name in heads.mask_in_features], regions)
        return (
            *features.values(),
            *logits,
            *deltas,
            *scores_and_deltas,
            heads.mask_head.layers(masks),
        )


@pytest.mark.parametrize("format", ["tracing", pytest.param("onnx", marks=needs_onnx)])
def test_features_logits_and_deltas_are_the_models(detector, format, tmp_path):
    exported, boxes = Numbers(fold(detector)), torch.tensor([[8.0, 8.0, 60.0, 70.0]])
    path = tmp_path / "numbers"
    with torch.no_grad(), path.open("wb") as file:
        if format == "tracing":
            traced = torch.jit.trace(exported, (image(128, 160), boxes), check_trace=False)
            torch.jit.save(traced, file)
        else:
            options = {} if torch.__version__ < "2.5" else {"dynamo": False}
            torch.onnx.export(
                exported, (image(128, 160), boxes), file, opset_version=ONNX_OPSET,
                input_names=["image", "boxes"],
                dynamic_axes={"image": {1: "height", 2: "width"}, "boxes": {0: "regions"}}, **options,
            )  # fmt: skip
    with torch.no_grad():
        run = torch.jit.load(str(path)) if format == "tracing" else run_by_onnxruntime(path)
        for height, width in [(128, 160), (96, 200)]:
            x = image(height, width, 1)
            expected, got = list(Numbers(detector)(x, boxes)), list(run(x, boxes))
            assert len(got) == len(expected) >= 15
            for value, right in zip(got, expected):
                assert relative_error(value, right) < 1e-4


def run_by_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]  # RetinaNet has no use for boxes

    def run(image, boxes):
        given = {"image": image.numpy(), "boxes": boxes.numpy()}
        return map(torch.from_numpy, session.run(None, {name: given[name] for name in names}))

    return run


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


@pytest.mark.parametrize("format", ["tracing", "scripting"])
def test_the_tool_exports_and_compares_the_ap(format, tmp_path):
    make_synthetic_coco(tmp_path, layout="shapes", train=1, val=2, size=64)
    model = Trainer.build_model(load_config(str(INSTANT), ["MODEL.WEIGHTS", ""]))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    command = [
        sys.executable, str(ROOT / "tools/export_model.py"), "--config-file", str(INSTANT),
        "--format", format, "--output", str(tmp_path / "model.ts"), "--evaluate",
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


def test_a_detector_without_weights_is_refused_in_one_line(tmp_path, capsys):
    output = tmp_path / "model.onnx"
    with pytest.raises(SystemExit) as error:
        load_tool("export_model").main(["--config-file", str(INSTANT), "--output", str(output)])
    assert error.value.code == 2 and not output.exists()
    assert "MODEL.WEIGHTS is empty" in capsys.readouterr().err
