import collections
import hashlib
import itertools
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mabn_d2.data import make_synthetic_coco, register_shapes
from mabn_d2.data.synthetic import looks as looks_module
from mabn_d2.data.synthetic import make as synthetic
from mabn_d2.data.synthetic.annotations import annotate, mask_to_polygons, uncompressed_rle
from mabn_d2.data.synthetic.scenes import (
    SHAPES,
    Scene,
    Thing,
    coco_scene,
    shapes_scene,
)

from .helpers import load_tool

SHAPE_IDS = list(range(1, len(SHAPES) + 1))
COCO_SIZE = 160


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_synthetic_coco(tmp_path_factory.mktemp("data"), train=80, val=10)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    return make_synthetic_coco(out, "coco2017", train=24, val=4, size=COCO_SIZE)


def load(root, name):
    return COCO(root / "annotations" / f"{name}.json")


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def decode(entry, shape):
    holder = COCO()
    holder.imgs = {1: {"height": shape[0], "width": shape[1]}}
    return holder.annToMask({**entry, "image_id": 1}).astype(bool)


def scenes(count, draw=shapes_scene, size=128):
    return [draw(np.random.default_rng([5, index]), size) for index in range(count)]


def annotated(scene, ids=SHAPE_IDS, person_id=None):
    return annotate(scene, ids, person_id, np.random.default_rng(0))


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout, workers", [("shapes", 1), ("coco2017", 2)])
def test_same_arguments_give_the_same_bytes_with_any_number_of_workers(tmp_path, layout, workers):
    arguments = dict(layout=layout, train=10, val=2, size=64, seed=3)
    one = make_synthetic_coco(tmp_path / "one", **arguments)
    two = make_synthetic_coco(tmp_path / "two", **arguments, workers=workers)
    assert digests(one) == digests(two)


def test_another_seed_gives_other_images_and_annotations(tmp_path):
    roots = [make_synthetic_coco(tmp_path / f"{s}", train=4, val=4, seed=s) for s in (0, 1)]
    first, second = map(digests, roots)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_train_and_val_hold_different_images(shapes):
    files = digests(shapes)
    train, val = (
        {digest for name, digest in files.items() if name.startswith(f"{split}/")}
        for split in ("train", "val")
    )
    assert len(train) == 80 and len(val) == 10 and not train & val


# ---- files on disk -------------------------------------------------------------------------------


def test_existing_data_is_never_overwritten(tmp_path):
    (tmp_path / "shapes" / "train").mkdir(parents=True)
    precious = tmp_path / "shapes" / "train" / "a.jpg"
    precious.write_text("precious")
    with pytest.raises(FileExistsError, match=str(tmp_path / "shapes")):
        make_synthetic_coco(tmp_path, train=1, val=1)
    assert precious.read_text() == "precious"
    assert os.listdir(tmp_path) == ["shapes"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "shapes").mkdir()
    assert list(make_synthetic_coco(tmp_path, train=1, val=1).iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_is_left_behind_on_interruption(tmp_path, monkeypatch, error, split):
    write = synthetic._write_image

    def interrupted(task, index):
        if task.split == split and index == 2:
            raise error("stop")
        return write(task, index)

    monkeypatch.setattr(synthetic, "_write_image", interrupted)
    with pytest.raises(error):
        make_synthetic_coco(tmp_path / "new", train=4, val=4, size=32)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_caller_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_shape_categories", lambda: [])  # workers find no ids
    with pytest.raises(IndexError):
        make_synthetic_coco(tmp_path, train=40, val=1, size=32, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value",
    [
        *[("train", 0), ("val", -1), ("size", 31), ("seed", -1), ("workers", 0)],
        *[("layout", "voc"), ("variety", "odd")],
    ],
)
def test_bad_values_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        make_synthetic_coco(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


# ---- annotations ---------------------------------------------------------------------------------


def test_json_has_the_fields_of_coco_and_images_have_the_recorded_size(shapes):
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
    assert [c["name"] for c in content["categories"]] == list(SHAPES)
    fields = {"id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"}
    ids = [entry["id"] for entry in content["annotations"]]
    assert all(set(entry) == fields for entry in content["annotations"])
    assert len(set(ids)) == len(ids) and min(ids) == 1
    for record in content["images"]:
        image = cv2.imread(str(shapes / "train" / record["file_name"]))
        assert image.shape == (record["height"], record["width"], 3) == (128, 128, 3)


def test_all_categories_and_several_objects_occur(shapes):
    data = load(shapes, "instances_train")
    assert {entry["category_id"] for entry in data.anns.values()} == set(SHAPE_IDS)
    counts = [len(data.imgToAnns[image_id]) for image_id in data.imgs]
    assert 3 < np.mean(counts) < 6 and max(counts) <= 8
    areas = [entry["area"] for entry in data.anns.values()]
    assert np.quantile(areas, 0.9) > 5 * np.quantile(areas, 0.1)


def test_polygons_area_and_box_fit_what_is_visible():
    compared = 0
    for scene in scenes(60):
        for number, entry in annotated(scene).items():
            visible = scene.owner == number
            x, y, width, height = map(int, entry["bbox"])
            assert entry["area"] == visible.sum() > 0
            assert visible[y : y + height, x : x + width].sum() == entry["area"]
            assert visible[:, x].any() and visible[:, x + width - 1].any()
            assert visible[y].any() and visible[y + height - 1].any()
            if entry["iscrowd"] or entry["area"] <= 100:
                continue
            drawn = decode(entry, visible.shape)
            assert (drawn & visible).sum() > 0.9 * (drawn | visible).sum()
            compared += 1
    assert compared > 100


def test_masks_of_different_objects_do_not_overlap(shapes):
    data, split_objects = load(shapes, "instances_train"), 0
    for image_id in data.imgs:
        entries = [entry for entry in data.imgToAnns[image_id] if not entry["iscrowd"]]
        split_objects += sum(len(entry["segmentation"]) > 1 for entry in entries)
        for a, b in itertools.combinations(map(data.annToMask, entries), 2):
            assert (a & b).sum() <= 0.02 * min(a.sum(), b.sum())
    assert split_objects  # by occlusion, and around holes


def test_objects_occlude_one_another():
    boxes = overlapping = 0
    for scene in scenes(40):
        entries = [entry["bbox"] for entry in annotated(scene).values()]
        for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(entries, 2):
            boxes += 1
            overlapping += ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah
    assert overlapping > 0.1 * boxes


def test_a_hole_is_cut_out_of_the_polygons():
    mask = np.zeros((40, 50), np.uint8)
    mask[5:35, 5:45] = 1
    mask[12:20, 10:18] = mask[22:30, 30:40] = 0
    polygons = mask_to_polygons(mask)
    assert all(len(polygon) >= 6 for polygon in polygons)
    assert (decode({"segmentation": polygons}, mask.shape) == mask).mean() > 0.99


def test_hidden_and_tiny_objects_are_not_annotated():
    scene = Scene(np.zeros((32, 32, 3), np.uint8), things=[Thing(0), Thing(1), Thing(2)])
    scene.owner[4:16, 4:16] = 2  # nothing is left of thing 1
    scene.owner[20:22, 20:22] = 3
    assert list(annotated(scene)) == [2]


def test_crowds_are_one_annotation_in_run_lengths():
    found = [
        (scene, number, entry)
        for scene in scenes(200)
        for number, entry in annotated(scene).items()
        if entry["iscrowd"]
    ]
    assert 3 <= len(found) <= 20
    parts = []
    for scene, number, entry in found:
        assert isinstance(entry["segmentation"]["counts"], list)
        assert np.array_equal(decode(entry, (128, 128)), scene.owner == number)
        parts.append(cv2.connectedComponents((scene.owner == number).astype(np.uint8))[0] - 1)
    assert max(parts) >= 5


def test_run_lengths_start_with_zeros_even_when_the_first_pixel_is_set():
    mask = np.array([[1, 0, 1], [1, 0, 1]], np.uint8)
    assert uncompressed_rle(mask) == {"counts": [0, 2, 2, 2], "size": [2, 3]}
    assert uncompressed_rle(1 - mask) == {"counts": [2, 2, 2], "size": [2, 3]}


def test_few_images_have_no_object():
    empty = np.mean([not scene.things for scene in scenes(400, size=32)])
    assert 0.01 < empty < 0.06


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_scores_full_average_precision(shapes, kind):
    truth = load(shapes, "instances_train")
    entries = [entry for entry in truth.anns.values() if not entry["iscrowd"]]
    results = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": 1.0,
            "bbox": entry["bbox"],
            "segmentation": truth.annToRLE(entry),
        }
        for entry in entries
    ]
    if kind == "bbox":
        for result in results:
            del result["segmentation"]
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.97


# ---- looks ---------------------------------------------------------------------------------------


def test_every_look_is_equally_likely(monkeypatch):
    seen = collections.Counter()
    for name in looks_module.LOOKS:
        count = lambda rng, image, name=name: name  # noqa: E731
        monkeypatch.setitem(looks_module.LOOKS, name, count)
    rng = np.random.default_rng(0)
    for _ in range(600):
        name, result = looks_module.random_look(rng, np.zeros((2, 2, 3), np.float32))
        assert result == name
        seen[name] += 1
    assert set(seen) == {"dark", "haze", "noise", "cast", "blur", "inversion"}
    assert min(seen.values()) > 70


def test_looks_have_their_stated_strength():
    image = np.full((128, 128, 3), 100, np.float32)
    image[:, 64:] = 200
    for seed in range(20):
        rng = np.random.default_rng(seed)
        look = {name: apply(rng, image) for name, apply in looks_module.LOOKS.items()}
        assert 6 <= look["dark"][0, 0, 0] <= 20
        assert 10 <= look["haze"][0, 127, 0] - look["haze"][0, 0, 0] <= 25
        assert 160 <= look["haze"][0, 0, 0] <= 210
        assert np.isclose(np.std(look["noise"] - image), 45, rtol=0.05)
        gains = look["cast"][0, 0] / 100
        assert gains.min() >= 0.1 and gains.max() <= 1 and np.ptp(gains) > 0
        assert np.array_equal(look["inversion"], 255 - image)
        # The steepest slope of a step of height 100 blurred with sigma is 100 / (2 pi)^0.5 / sigma.
        assert np.isclose(np.diff(look["blur"][64, :, 0]).max(), 39.9 / 1.6, rtol=0.1)


def test_blur_grows_with_the_image():
    blur = looks_module.LOOKS["blur"]
    step = np.repeat(np.float32([[0] * 64 + [100] * 64]), 128, axis=0)
    slopes = [
        np.diff(
            blur(None, np.dstack([cv2.resize(step, (side, side), interpolation=0)] * 3)), axis=1
        )
        for side in (128, 512)
    ]
    assert np.isclose(slopes[0].max() / slopes[1].max(), 4, rtol=0.1)


# ---- varieties -----------------------------------------------------------------------------------


def images_of(root, layout="shapes"):
    folder = root / ("train" + synthetic.LAYOUTS[layout].suffix)
    return [cv2.imread(str(path)).astype(float) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("layout", ["shapes", "coco2017"])
def test_images_with_looks_differ_from_one_another_much_more_than_those_alike(tmp_path, layout):
    spread = {}
    for variety in ("looks", "alike"):
        arguments = dict(train=30, val=1, size=64, variety=variety)
        images = images_of(make_synthetic_coco(tmp_path / variety, layout, **arguments), layout)
        means, deviations = np.array([[im.mean(), im.std()] for im in images]).T
        spread[variety] = np.array([means.std(), deviations.std()])
    assert (spread["looks"] > (1.7, 1.3) * spread["alike"]).all(), spread
    assert spread["looks"][0] > 40


def test_content_differs_after_each_image_is_normalized_by_itself(tmp_path):
    spread, objects = {}, {}
    for variety in ("content", "alike"):
        root = make_synthetic_coco(tmp_path, train=40, val=1, variety=variety)
        normalized = [(im - im.mean((0, 1))) / im.std((0, 1)) for im in images_of(root)]
        edges = [cv2.Laplacian(image, cv2.CV_64F).std() for image in normalized]
        spread[variety] = np.std(np.log(edges))
        coco = load(root, "instances_train")
        objects[variety] = np.std([len(coco.getAnnIds(image)) for image in coco.imgs])
    assert spread["content"] > 2 * spread["alike"], spread
    assert objects["content"] > 1.5 * objects["alike"], objects


def test_the_annotations_tell_the_look_of_each_image(tmp_path):
    root = make_synthetic_coco(tmp_path, train=60, val=1, size=32)
    images = load(root, "instances_train").imgs.values()
    assert {image["look"] for image in images} == {*looks_module.LOOKS}


def test_every_variety_of_shapes_is_registered(tmp_path):
    for variety in synthetic.VARIETIES:
        make_synthetic_coco(tmp_path, train=2, val=1, size=32, variety=variety)
    register_shapes(str(tmp_path))
    for name in ("shapes", "shapes_content", "shapes_alike"):
        assert len(DatasetCatalog.get(f"{name}_train")) == 2
        assert len(DatasetCatalog.get(f"{name}_val")) == 1


def test_content_is_of_shapes_alone(tmp_path):
    with pytest.raises(ValueError, match="variety .* looks, alike for layout coco2017.*'content'"):
        make_synthetic_coco(tmp_path, "coco2017", variety="content")


# ---- layout "coco2017" ---------------------------------------------------------------------------


def test_coco_layout_has_the_files_and_categories_of_coco(coco):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    expected = {
        *("annotations", "train2017", "val2017", "panoptic_train2017", "panoptic_val2017"),
        *("panoptic_stuff_train2017", "panoptic_stuff_val2017"),
    }
    assert set(os.listdir(coco)) == expected
    assert (coco / "train2017" / "000000000001.jpg").is_file()
    categories = json.loads((coco / "annotations/instances_val2017.json").read_text())["categories"]
    things = [(c["id"], c["name"]) for c in COCO_CATEGORIES if c["isthing"]]
    assert [(c["id"], c["name"]) for c in categories] == things
    parents = {c["name"]: c["supercategory"] for c in categories}
    known = {"person": "person", "dog": "animal", "fork": "kitchen", "toothbrush": "indoor"}
    assert known.items() <= parents.items()


def test_coco_images_are_landscapes_and_portraits_around_the_size(coco):
    sides = np.array(
        [[r["width"], r["height"]] for r in load(coco, "instances_train2017").imgs.values()]
    )
    short = sides.min(axis=1)
    assert (np.abs(short / COCO_SIZE - 1) < 0.16).all() and len(set(short)) > 5
    assert (sides[:, 0] > sides[:, 1]).any() and (sides[:, 0] < sides[:, 1]).any()


def test_every_coco_category_has_a_look_of_its_own():
    from mabn_d2.data.synthetic import scenes as module

    pictures = []
    for category in range(80):
        scene = Scene(np.full((64, 64, 3), 128, np.uint8), things=[Thing(category)])
        rng = np.random.default_rng(0)  # the same pose for all
        module._draw_category(rng, scene, category, np.array([32, 32]), 28)
        pictures.append(scene.image.astype(float))
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(a - b).mean() > 5


def test_keypoints_lie_on_the_figure_and_tell_hidden_from_visible():
    visibilities = collections.Counter()
    for scene in scenes(40, coco_scene, COCO_SIZE):
        for number, entry in annotated(scene, list(range(80)), person_id=0).items():
            if entry["category_id"] != 0:
                assert "keypoints" not in entry
                continue
            points = np.array(entry["keypoints"]).reshape(17, 3)
            assert entry["num_keypoints"] == np.count_nonzero(points[:, 2])
            if entry["iscrowd"]:
                assert entry["num_keypoints"] == 0
            for x, y, visible in points:
                visibilities[visible] += 1
                if visible == 0:
                    assert x == y == 0
                else:
                    assert (scene.owner[y, x] == number) == (visible == 2)
                    assert scene.owner[y, x] >= number  # on the figure, or on what hides it
            left, right = points[5], points[6]
            if left[2] and right[2]:
                assert left[0] >= right[0]  # the figure faces the viewer
    assert set(visibilities) == {0, 1, 2}
    assert visibilities[2] > visibilities[1]


def test_person_keypoint_files_hold_the_people_of_the_instance_files(coco):
    from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

    people, instances = load(coco, "person_keypoints_train2017"), load(coco, "instances_train2017")
    (category,) = people.cats.values()
    assert category["keypoints"] == list(COCO_PERSON_KEYPOINT_NAMES)
    assert len(category["skeleton"]) == 19 and category["name"] == "person"
    persons = instances.getAnnIds(catIds=[1])
    assert persons and set(people.anns) == set(persons)
    for annotation_id in persons:
        shared = instances.anns[annotation_id]
        assert shared.items() <= people.anns[annotation_id].items()


def test_panoptic_and_semantic_ground_truth_agree_with_the_instances(coco):
    content = json.loads((coco / "annotations" / "panoptic_train2017.json").read_text())
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    stuff = sorted(c["id"] for c in content["categories"] if not c["isthing"])
    instances = load(coco, "instances_train2017")
    for record in content["annotations"]:
        segments, labels = (
            cv2.imread(str(coco / folder / record["file_name"]), cv2.IMREAD_UNCHANGED)
            for folder in ("panoptic_train2017", "panoptic_stuff_train2017")
        )
        ids = segments[..., ::-1].astype(int) @ (1, 256, 65536)
        info = record["segments_info"]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in info}
        for segment in info:
            region = ids == segment["id"]
            assert region.sum() == segment["area"]
            thing = segment["category_id"] in things
            label = 0 if thing else 1 + stuff.index(segment["category_id"])
            assert (labels[region] == label).all()
        assert (labels[ids == 0] == 255).all()
        areas = [segment["area"] for segment in info if segment["category_id"] in things]
        entries = instances.imgToAnns[record["image_id"]]
        assert areas == [entry["area"] for entry in entries]


# ---- Detectron2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_detectron2_loads_shapes_for_training(shapes, mask_format):
    from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
    from detectron2.data.transforms import RandomFlip

    register_shapes(shapes.parent)
    dicts = DatasetCatalog.get("shapes_train")
    assert len(dicts) == 80
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[RandomFlip()],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    dicts = [entry for entry in dicts if entry["annotations"]]
    loader = build_detection_train_loader(
        dicts, mapper=mapper, total_batch_size=2, num_workers=0, aspect_ratio_grouping=False
    )
    for batch in itertools.islice(loader, 3):
        for sample in batch:
            assert sample["image"].shape == (3, 128, 128)
            assert len(sample["instances"].gt_masks) == len(sample["instances"].gt_boxes)
            assert sample["instances"].gt_classes.max() < len(SHAPES)


def test_registering_shapes_again_is_harmless_and_another_root_replaces_the_first(monkeypatch):
    from detectron2.data import MetadataCatalog

    register_shapes("a")
    first = MetadataCatalog.get("shapes_val")
    register_shapes("a")
    assert MetadataCatalog.get("shapes_val") is first
    assert first.thing_classes == list(SHAPES) and first.evaluator_type == "coco"
    monkeypatch.setenv("DETECTRON2_DATASETS", "b")
    register_shapes()
    assert MetadataCatalog.get("shapes_val").image_root == os.path.join("b", "shapes", "val")


def test_unmodified_coco_configs_load_the_coco_layout(coco):
    program = """
from detectron2 import model_zoo
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
for name, field in {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "gt_masks",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": "gt_keypoints",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": "sem_seg",
}.items():
    cfg = model_zoo.get_config(name + ".yaml")
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    for split, train in ((cfg.DATASETS.TRAIN, True), (cfg.DATASETS.TEST, False)):
        dicts = get_detection_dataset_dicts(split, filter_empty=train, min_keypoints=least * train)
        mapper = DatasetMapper(cfg, train)
        for entry in dicts[:4]:
            sample = mapper(entry)
            if train:
                assert field in sample or sample["instances"].has(field), (name, field)
from detectron2.data import DatasetCatalog
assert len(DatasetCatalog.get("coco_2017_train_panoptic")) == 24
assert len(DatasetCatalog.get("coco_2017_val_panoptic_stuffonly")) == 4
"""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(coco.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- tool ----------------------------------------------------------------------------------------


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_synthetic_coco.py", *map(str, arguments)])
    return load_tool("make_synthetic_coco").main()


def test_the_tool_says_where_the_data_is_and_how_to_use_it(tmp_path, monkeypatch, capsys):
    assert run_tool(monkeypatch, tmp_path, "--train", 3, "--val", 2, "--size", 64) == 0
    output = capsys.readouterr().out
    annotations = tmp_path / "shapes" / "annotations"
    for split, count in (("train", 3), ("val", 2)):
        assert f"{annotations / f'instances_{split}.json'}: {count} images" in output
    assert f"DETECTRON2_DATASETS={tmp_path}" in output


@pytest.mark.parametrize(
    "arguments, word",
    [(["--train", 0], "train"), (["--size", 8], "size"), (["--layout", "voc"], "layout")],
)
def test_the_tool_reports_bad_values_in_one_line(tmp_path, monkeypatch, capsys, arguments, word):
    assert run_tool(monkeypatch, tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_the_tool_refuses_existing_data_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = (tmp_path, "--train", 1, "--val", 1, "--size", 32)
    assert run_tool(monkeypatch, *arguments) == 0
    before = digests(tmp_path)
    capsys.readouterr()
    assert run_tool(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "shapes") in error and error.count("\n") == 1
    assert digests(tmp_path) == before


def test_the_tool_survives_ctrl_c_without_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(task, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_write_image", interrupt)
    assert run_tool(monkeypatch, tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
