import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from mabn_d2 import add_mabn_config, report
from mabn_d2.data import make_synthetic_coco, register_shapes
from mabn_d2.report import curves, detections, predictions
from mabn_d2.report.run import describe_model

from .helpers import ROOT, load_tool


def losses(iteration, total=3.0):
    return {"iteration": iteration, "total_loss": total, "loss_cls": total / 4, "loss_mask": 0.02}


def evaluation(iteration, ap=30.0):
    scores = {"AP": ap, "AP50": 2 * ap, "AP75": math.nan}
    entry = {f"{task}/{key}": v for task in ("bbox", "segm") for key, v in scores.items()}
    return {"iteration": iteration, **entry, "bbox/AP-star": 1.0, "bbox/APs": 1.0}


def write_lines(path, *entries):
    lines = (entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries)
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    names = [name for name in ("shapes_train", "shapes_val") if name in DatasetCatalog.list()]
    roots = {Path(MetadataCatalog.get(name).json_file).parents[2] for name in names}
    root = make_synthetic_coco(tmp_path_factory.mktemp("data"), train=1, val=9)
    register_shapes(str(root.parent))
    yield root
    register_shapes(str(roots.pop()) if roots else None)


@pytest.fixture
def run(tmp_path, dataset):
    """Output folder of a run whose detections are the ground truth."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "MABN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.DATASETS.TEST = ("shapes_val",)
    (tmp_path / "inference").mkdir()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    write_lines(tmp_path / "metrics.json", losses(19), evaluation(29), losses(39), evaluation(40))
    write_detections(tmp_path, dataset)
    return tmp_path


def write_detections(run, dataset, score=0.9):
    coco = COCO(dataset / "annotations" / "instances_val.json")
    entries = []
    for annotation in coco.anns.values():
        mask = coco.annToRLE(annotation)
        mask["counts"] = mask["counts"].decode()
        entry = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        entries.append({**entry, "score": score, "segmentation": mask})
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(entries))


def error_of(monkeypatch, capsys, *arguments):
    """What the tool prints when it fails."""
    tool = load_tool("report")
    monkeypatch.setattr(tool, "bring_in", lambda arguments: None)  # the fixture has done it
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    assert tool.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report.py: error: ")
    return err


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_of_a_resumed_run(tmp_path):
    half = json.dumps(losses(59))[:40]
    path = write_lines(
        tmp_path / "metrics.json",
        *(losses(19), evaluation(29), losses(39, total=5.0), half),
        *(losses(39, total=4.0), "no JSON\n", "[1]\n", "{}\n", "\n", losses(59), half),
    )
    metrics = report.read_metrics(path)
    assert list(metrics) == [19, 29, 39, 59]
    assert metrics[39]["total_loss"] == 4.0  # although it follows half a line
    assert metrics[29]["bbox/AP"] == 30.0


def test_evaluations_written_late_and_values_apart_are_merged(tmp_path):
    entries = losses(19), losses(39), evaluation(29), evaluation(39), losses(59)
    metrics = report.read_metrics(write_lines(tmp_path / "metrics.json", *entries))
    assert list(metrics) == [19, 29, 39, 59]
    assert {"total_loss", "segm/AP"} <= set(metrics[39])


def test_training_that_starts_over_replaces_the_run_before(tmp_path):
    entries = losses(19), losses(39), evaluation(40), losses(19, total=1.0)
    metrics = report.read_metrics(write_lines(tmp_path / "metrics.json", *entries))
    assert list(metrics) == [19] and metrics[19]["total_loss"] == 1.0


def test_table_holds_the_last_evaluation(tmp_path):
    path = write_lines(tmp_path / "metrics.json", evaluation(9, 1.0), evaluation(29), losses(39))
    assert report.ap_table(path).splitlines() == [
        "| iteration 29 |    AP |  AP50 |  AP75 |",
        "| ------------ | ----: | ----: | ----: |",
        "| box          | 30.00 | 60.00 |     - |",
        "| mask         | 30.00 | 60.00 |     - |",
    ]


def test_table_of_several_data_sets(tmp_path):
    entry = {"iteration": 9, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0}
    table = report.ap_table(write_lines(tmp_path / "metrics.json", entry))
    assert "| a box " in table and "| b box " in table


def test_smoothing():
    few = np.array([1.0, 5.0, 2.0])
    assert np.array_equal(curves.smooth(few), few)
    rng = np.random.default_rng(0)
    noisy = 2 + rng.normal(size=400)
    noisy[50] = np.nan
    result = curves.smooth(noisy)
    assert result.shape == noisy.shape and np.flatnonzero(np.isnan(result)) == [50]
    assert np.nanstd(result) < 0.5 * np.nanstd(noisy) and abs(np.nanmean(result) - 2) < 0.2
    assert np.allclose(curves.smooth(np.full(100, 3.0)), 3.0)  # up to the ends


# ---- pictures ------------------------------------------------------------------------------------


def read_picture(path):
    image = cv2.imread(str(path))
    assert image is not None and len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    return image


def test_curves(run):
    curves.plot_curves(str(run / "metrics.json"), str(run / "curves.png"))
    assert read_picture(run / "curves.png").shape == (750, 1000, 3)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_curves_without_finite_losses(run):
    path = write_lines(run / "metrics.json", losses(19, total=math.nan), evaluation(19, math.nan))
    curves.plot_curves(path, str(run / "curves.png"))
    read_picture(run / "curves.png")


def test_panel_has_a_row_for_two_images(run, monkeypatch):
    monkeypatch.setattr(
        predictions, "_draw_shape", lambda *arguments: None
    )  # takes most of the time
    shapes = []
    for count in (1, 3):
        predictions.draw_predictions(str(run), str(run / "predictions.png"), count)
        shapes.append(read_picture(run / "predictions.png").shape)
    (height, width, _), three = shapes
    assert height > 384 and width > 2 * 384
    assert three[0] > height + 384 and 1.9 * width < three[1] < 2 * width


def test_panel_depends_on_the_seed_alone(run):
    pictures = []
    for seed in (0, 0, 1):
        predictions.draw_predictions(str(run), str(run / "predictions.png"), 1, seed)
        pictures.append((run / "predictions.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_images_are_spread_and_of_few_objects():
    counts = [1, 3, 9] * 10
    records = [{"image_id": i, "annotations": [{}] * n} for i, n in enumerate(counts)]
    for seed in range(5):
        chosen = predictions._choose(records, 5, seed)
        assert [record["image_id"] // 6 for record in chosen] == [0, 1, 2, 3, 4]
        assert all(len(record["annotations"]) == 3 for record in chosen)
    assert predictions._choose(records[:2], 6, 0) == records[:2]


def test_detections_shown():
    def select(*scores):
        things = [predictions._Object(0, (0, 0, 1, 1), score=score) for score in scores]
        shown, caption = predictions._select(things)
        return [thing.score for thing in shown], caption

    assert select(0.2, 0.5, 0.9) == ([0.9, 0.5], "2 detections of score ≥ 0.5")
    assert select(0.1, 0.2, 0.3, 0.4) == (
        [0.4, 0.3, 0.2],
        "none of score ≥ 0.5, the best 3 shown",
    )
    assert select() == ([], "no detections")


def test_detections_are_read_as_the_ground_truth_they_are(run):
    records = predictions._load_dataset("shapes_val")
    entries = predictions.read_detections(str(run / "inference" / "coco_instances_results.json"))
    metadata = MetadataCatalog.get("shapes_val")
    for record in records:
        own = [entry for entry in entries if entry["image_id"] == record["image_id"]]
        found = [predictions._detected(entry, metadata) for entry in own]
        truth = [predictions._annotated(entry, record) for entry in record["annotations"]]
        assert [thing.category for thing in found] == [thing.category for thing in truth]
        for one, other in zip(found, truth):
            assert one.score == 0.9 and other.score is None
            assert np.allclose(one.box, other.box)
            assert one.mask.shape == (128, 128) and np.array_equal(one.mask, other.mask)


def test_labels_do_not_overlap():
    size, frame, taken = (80.0, 20.0), (384.0, 384.0), []
    for box in [(10, 5, 60, 90), (12, 8, 55, 80), (9, 4, 50, 60), (330, 370, 384, 384)] * 3:
        x, y = predictions._place(size, box, frame, taken)
        assert 0 <= x <= frame[0] - size[0] and 0 <= y <= frame[1] - size[1]
        taken.append((x, y, x + size[0], y + size[1]))
    assert sum(predictions._covered(box, taken[:i]) for i, box in enumerate(taken)) == 0


def test_detections_without_masks_and_none_at_all(run):
    path = run / "inference" / "coco_instances_results.json"
    entries = [
        {k: v for k, v in e.items() if k != "segmentation"} for e in json.loads(path.read_text())
    ]
    for content in (entries, []):
        path.write_text(json.dumps(content))
        predictions.draw_predictions(str(run), str(run / "predictions.png"), 1)
        read_picture(run / "predictions.png")


def test_a_failed_write_leaves_the_old_picture(run, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, f, **options):
        f.write(b"half")
        raise OSError("disk full")

    (run / "curves.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        curves.plot_curves(str(run / "metrics.json"), str(run / "curves.png"))
    assert (run / "curves.png").read_text() == "old"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_description_of_models():
    cfg = get_cfg()
    add_mabn_config(cfg)
    assert describe_model(cfg) == "Faster R-CNN R50, norm FrozenBN / none"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "MABN"
    assert describe_model(cfg) == "RetinaNet R50-FPN, norm MABN"


# ---- what is found -------------------------------------------------------------------------------


@pytest.fixture
def truth():
    """Two dark images with one object each, one bright image with two."""
    boxes = [(1, [0, 0, 10, 10]), (2, [0, 0, 10, 10]), (3, [0, 0, 10, 10]), (3, [20, 20, 10, 10])]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": 64, "height": 64, "look": "dark" if i < 3 else "bright"} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "circle"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for i, (image, box) in enumerate(boxes, start=1)
        ],
    }  # fmt: skip
    coco.createIndex()
    return coco


def detection(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_an_object_is_found_by_a_confident_box_of_its_class_that_covers_it(truth):
    found = [
        detection(1, [0, 0, 10, 10], 0.9),
        detection(2, [0, 0, 10, 10], 0.4),  # not confident
        detection(3, [0, 0, 10, 10], 0.9, category=2),  # of another class
        detection(3, [20, 20, 10, 6], 0.6),  # IoU 0.6
        detection(3, [20, 20, 10, 10], 0.5),  # the same object
    ]
    assert detections.found_share(truth, found) == 2 / 4
    assert detections.found_share(truth, found[1:3]) == 0


def test_ap_by_look_is_the_ap_on_the_images_of_that_look(truth):
    found = [detection(1, [0, 0, 10, 10], 0.9), detection(3, [0, 0, 10, 10], 0.8)]
    # Precision 1 up to a recall of 1/2, which 51 of COCO's 101 recall levels do not exceed.
    np.testing.assert_allclose(detections.box_ap(truth, found, [1, 2]), 100 * 51 / 101)
    np.testing.assert_allclose(detections.box_ap(truth, found, [1]), 100)
    assert detections.box_ap(truth, found, [2]) == 0


def test_ap_of_images_without_an_object_is_no_number(truth):
    truth.dataset["images"].append({"id": 4, "width": 64, "height": 64})
    truth.createIndex()
    assert math.isnan(detections.box_ap(truth, [detection(4, [0, 0, 10, 10], 0.9)], [4]))


def test_what_a_run_has_found_is_counted_on_its_first_data_set(run, dataset):
    objects = len(COCO(dataset / "annotations" / "instances_val.json").getAnnIds(iscrowd=0))
    path = run / "inference" / "coco_instances_results.json"
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("- shapes_val", "- shapes_val\n  - shapes_train")
    )
    assert report.found_sentence(str(run)).startswith("100.0 % of the objects of shapes_val are")
    crowd = COCO(dataset / "annotations" / "instances_val.json").getAnnIds(iscrowd=1)
    entries = json.loads(path.read_text())
    entries[next(i for i in range(len(entries)) if i + 1 not in crowd)]["score"] = 0.4
    path.write_text(json.dumps(entries))
    expected = (
        f"{100 * (objects - 1) / objects:.1f} % of the objects of shapes_val are found, by a box "
    )
    assert report.found_sentence(str(run)).startswith(expected)


def test_predictions_of_several_data_sets_are_those_of_the_first(run, monkeypatch):
    """The evaluators of the others write into folders of their own."""
    cfg = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(cfg.replace("- shapes_val", "- shapes_val\n  - shapes_train"))
    drawn = []
    monkeypatch.setattr(predictions, "_compare", lambda name, *rest: drawn.append(name))
    predictions.draw_predictions(str(run), str(run / "predictions.png"))
    assert drawn == ["shapes_val"]


# ---- the tool ------------------------------------------------------------------------------------


def test_tool(run, dataset):
    tool = str(ROOT / "tools/report.py")
    code = (
        "import sys, runpy, mabn_d2.report; assert 'matplotlib' not in sys.modules;"
        f"sys.argv = ['report.py', {str(run)!r}, '--images', '1'];"
        f"main = runpy.run_path({tool!r})['main']; assert main() == 0;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DETECTRON2_DATASETS": str(dataset.parent)},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "| mask " in process.stdout
    assert "100.0 % of the objects of shapes_val are found" in process.stdout
    for name in ("curves.png", "predictions.png"):
        assert f"{run / name}\n" in process.stdout
        read_picture(run / name)


@pytest.mark.parametrize(
    "name", ["metrics.json", "config.yaml", "inference/coco_instances_results.json"]
)
def test_missing_and_broken_files_are_named(run, monkeypatch, capsys, name):
    (run / name).write_text('{"a"\n: [')
    assert str(run / name) in error_of(monkeypatch, capsys, run)
    (run / name).unlink()
    assert f"{run / name} is missing" in error_of(monkeypatch, capsys, run)


def test_no_evaluation_yet(run, monkeypatch, capsys):
    write_lines(run / "metrics.json", losses(19))
    error = error_of(monkeypatch, capsys, run)
    assert f"{run / 'metrics.json'} holds no evaluation yet" in error
    assert not list(run.glob("*.png"))


def test_other_errors(run, tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere / "metrics.json") in error_of(monkeypatch, capsys, nowhere)
    assert "at least 1, got 0" in error_of(monkeypatch, capsys, run, "--images", 0)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("shapes_val", "unheard_of"))
    assert "unheard_of" in error_of(monkeypatch, capsys, run)


def test_data_set_that_is_gone(run, monkeypatch, capsys):
    metadata = MetadataCatalog.get("shapes_val")
    monkeypatch.setitem(metadata.__dict__, "json_file", "/gone/instances_val.json")
    error = error_of(monkeypatch, capsys, run)
    assert "/gone/instances_val.json" in error and "DETECTRON2_DATASETS" in error


def test_without_matplotlib(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in error_of(monkeypatch, capsys, run)
