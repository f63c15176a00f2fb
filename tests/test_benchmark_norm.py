import collections
import csv

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from mabn_d2 import MABN2d, add_mabn_config
from mabn_d2.benchmark import measure, shapes, table

from .helpers import CONFIGS, load_tool

CONFIG = CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_bn.yaml"
NORMS = ["BN", "MABN", "MBN", "BRN", "GN"]
SMALL = [("first", (2, 32, 8, 8), 3, True), ("second", (4, 64, 4, 6), 1, False)]
REFERENCE = """
import torch
import torchvision

class MABN2d(torch.nn.BatchNorm2d):
    def __init__(self, channels, B, real_B):
        assert (B, real_B) == (2, 32)
        super().__init__(channels)
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Where other work shares the cores, threads that wait for each other take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module, with small shapes in place of the model's."""
    module = load_tool("benchmark_norm")
    small = small_shapes()
    monkeypatch.setattr(module, "CHOICES_OF_SHAPES", {"all": small, "quick": small[:1]})
    return module


def small_shapes():
    return [shapes.Shape(*shape) for shape in SMALL]


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.py"
    path.write_text(REFERENCE)
    return path


def settings(tool, **options):
    return measure.Settings(torch.device("cpu"), **{"runs": 2, **options})


def rows_of(tool, **options):
    norms = measure.make_norms(torch.device("cpu"))
    return [
        row
        for group in measure.benchmark(small_shapes(), norms, settings(tool, **options))
        for row in group
    ]


def error_of(tool, capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        tool.main(list(argv))
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert not output.out
    assert output.err.startswith("benchmark_norm.py: error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_shapes_are_those_of_the_model(tool):
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.MODEL.DEVICE = "meta"
    model = build_model(cfg).train()
    seen = collections.Counter()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, out: seen.update([tuple(inputs[0].shape)]))
    height, width = cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MAX_SIZE_TRAIN
    padded = [-(-side // 32) * 32 for side in (height, width)]
    rois = 2 * cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    foreground = int(rois * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION)
    model.backbone(torch.empty(2, 3, *padded, device="meta"))
    model.roi_heads.box_head(torch.empty(rois, 256, 7, 7, device="meta"))
    model.roi_heads.mask_head.layers(torch.empty(foreground, 256, 14, 14, device="meta"))
    assert sum(seen.values()) == len(norms) == 69
    assert {shape.size: shape.norms for shape in shapes.SHAPES} == seen
    assert len(shapes.SHAPES) == len(seen)


def test_shapes_resnet50_are_those_of_the_model(tool):
    seen = collections.Counter()
    model = torchvision.models.resnet50().to("meta")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, out: seen.update([inputs[0].shape]))
    model(torch.empty(32, 3, 224, 224, device="meta"))
    assert {shape.size: shape.norms for shape in shapes.SHAPES_RESNET50} == seen
    assert len(shapes.SHAPES_RESNET50) == len(seen)


def test_norms_on_groups_of_images_are_measured_beside_those_on_the_whole_batch(tool, capsys):
    norms = measure.make_norms(torch.device("cpu"), norm_batch_size=2)
    assert norms["BN(2)"](4).norm_batch_size == norms["MABN(2)"](4).norm_batch_size == 2
    assert isinstance(norms["BN"](4), nn.BatchNorm2d) and not hasattr(norms["BN"](4), "frozen")
    assert tool.main(["--device", "cpu", "--runs", "1", "--norm-batch-size", "2"]) == 0
    output = capsys.readouterr().out
    for name in ("BN", "MABN", "MBN", "BRN"):
        assert f"\n{name}(2) / {name} " in output


def test_every_norm_is_measured(tool):
    rows = rows_of(tool)
    assert [(row.shape.name, row.norm) for row in rows] == [
        (shape, norm) for shape in ("first", "second") for norm in NORMS
    ]
    for row in rows:
        assert len(row.times) == 2 and min(row.times) > 0
        assert row.peak_bytes >= 2 * row.x_bytes  # the output and the gradient of x


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_mabn_keeps_only_the_input_and_vectors(tool, memory_format):
    rows = rows_of(tool, memory_format=measure.MEMORY_FORMATS[memory_format])
    for row in (row for row in rows if row.norm == "MABN"):
        channels = row.shape.size[1]
        assert 0 < row.saved_bytes - row.x_bytes <= 8 * 4 * channels


def test_mabn_is_measured_in_its_steady_state(tool):
    norm = MABN2d(32)
    x, upstream = measure.make_inputs(small_shapes()[0], settings(tool))
    measure.make_step(norm, x, upstream, settings(tool))
    assert norm.second_moment.count > norm.renorm_start_iter
    assert norm.psi.count > norm.renorm_start_iter
    assert all((buffer != 0).all() for buffer in norm.buffers())


def test_peak_memory_counts_temporaries(tool):
    def function():
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(500)  # 2000 bytes
        del first, second
        torch.empty(1250)  # 5000 bytes

    assert measure.peak_bytes(function, torch.device("cpu")) == 6000


def test_ratio_is_paired_within_a_round(tool):
    a, b = (
        measure.Row(small_shapes()[0], "", times, 1, 1, 1) for times in ([2, 40, 6], [1, 10, 3])
    )
    assert table.ratio(a, b) == 2


def test_summary_weighs_by_the_number_of_norms(tool):
    times = {"BN": (1.0, 1.0), "MABN": (2.0, 8.0)}
    rows = [
        measure.Row(shape, norm, [time], 1, 1, 1)
        for norm in times
        for shape, time in zip(small_shapes(), times[norm])
    ]
    lines = table.summarize(rows).splitlines()
    assert lines[1].split() == ["MABN", "/", "BN", "4.000", "3.500"]
    assert lines[-1].split() == ["MABN", "14.0"]


def test_reduced_precision(tool):
    rows = rows_of(tool, dtype=torch.bfloat16)
    assert {"BN", "MABN"} <= {row.norm for row in rows}
    assert rows[0].x_bytes == 2 * 2 * 32 * 8 * 8


def test_failing_norm_is_left_out(tool, capsys):
    norms = {"BN": nn.BatchNorm2d, "bad": lambda channels: nn.BatchNorm2d(channels + 1)}
    rows = measure.measure(small_shapes()[0], norms, settings(tool))
    assert [row.norm for row in rows] == ["BN"]
    assert capsys.readouterr().err.startswith("left out: bad on first: ")


def test_run(tool, tmp_path, reference, capsys):
    out = tmp_path / "out.csv"
    argv = ["--device", "cpu", "--runs", "2", "--csv", str(out), "--reference", str(reference)]
    assert tool.main(argv + ["--shapes", "all"]) == 0
    output = capsys.readouterr()
    assert not output.err
    for text in (torch.__version__, "SyncBN is left out", "MABN / BN", "reference / MABN"):
        assert text in output.out
    table = [line for line in output.out.splitlines() if line.startswith(("first", "second"))]
    assert len({len(line) for line in table}) == 1
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["norm"] for row in rows] == 2 * [*NORMS, "reference"]
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert sorted(tmp_path.iterdir()) == [out, reference]


def test_quick_is_the_default_on_the_cpu(tool, capsys):
    assert tool.main(["--device", "cpu", "--runs", "1"]) == 0
    output = capsys.readouterr().out
    assert "\nfirst" in output and "\nsecond" not in output


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--runs", "0"], "--runs"),
        (["--threads", "two"], "--threads"),
        (["--dtype", "float8"], "--dtype"),
        (["--shapes", "some"], "--shapes"),
        (["--nonsense"], "--nonsense"),
        (["--device", "cpu", "--queued"], "--queued"),
        (["--csv", "missing/folder/out.csv"], "--csv"),
        (["--reference", "missing.py"], "missing.py"),
    ],
)
def test_error_is_one_line(tool, capsys, argv, named):
    assert named in error_of(tool, capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_without_a_gpu(tool, capsys):
    assert "--device" in error_of(tool, capsys, "--device", "cuda")


@pytest.mark.parametrize(
    "code", ["", "raise RuntimeError('two\\nlines')", "class MABN2d:\n    pass", "syntax error"]
)
def test_unfit_reference_is_explained(tool, capsys, reference, code):
    reference.write_text(code)
    error = error_of(tool, capsys, "--reference", str(reference))
    assert "expected a class MABN2d, constructed as MABN2d(channels, B=2, real_B=32)" in error


def test_interruption_leaves_no_traceback(tool, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupt)
    assert tool.main(["--device", "cpu", "--csv", str(tmp_path / "out.csv")]) == 130
    assert capsys.readouterr().err == "benchmark_norm.py: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_help_explains_what_is_measured(tool, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.main(["--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert "Peak memory:" in output and "MABN2d(channels, B=2, real_B=32)" in output
