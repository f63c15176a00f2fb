"""tools/demo.py, run on a small data set with a small model."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Boxes, BoxMode, Instances

from mabn_d2.data import make_synthetic_coco, register_shapes
from mabn_d2.deploy import Predictor, draw, export_detector
from mabn_d2.deploy import outputs as destinations
from mabn_d2.engine import Trainer
from mabn_d2.plugin import load_config

from .helpers import INSTANT, ROOT, load_tool
from .helpers.runs import environment
from .helpers.settled import settle

needs_onnx = pytest.mark.skipif(
    not (find_spec("onnx") and find_spec("onnxruntime")), reason="onnx or onnxruntime is missing"
)
SIZE = 96  # pixels of the images, which are drawn at 512
FRAMES = 5


def options(folder):
    return [
        "MODEL.WEIGHTS", str(folder / "model.pth"), "MODEL.DEVICE", "cpu",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, a checkpoint and a video."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo")
    make_synthetic_coco(folder, layout="shapes", train=1, val=3, size=SIZE)
    model = Trainer.build_model(load_config(str(INSTANT), ["MODEL.WEIGHTS", ""]))
    settle(model, inputs=[dict(image=255 * torch.rand(3, SIZE, SIZE))])
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    video = cv2.VideoWriter(
        str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 7.0, (SIZE, SIZE)
    )
    for shade in range(FRAMES):
        video.write(np.full((SIZE, SIZE, 3), 40 * shade, np.uint8))
    video.release()
    return folder


@pytest.fixture
def images(folder):
    return sorted((folder / "shapes" / "val").iterdir())


@pytest.fixture
def demo(folder, tmp_path, monkeypatch, capsys):
    """Runs the tool in this process, in an empty folder; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    register_shapes(str(folder))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    tool = load_tool("demo")
    # Its handler would outlast the test and write into what pytest has closed.
    monkeypatch.setattr(tool, "setup_logger", lambda name: None)

    def demo(*arguments, weights=True):
        arguments = ["--config-file", INSTANT, *arguments, *(options(folder) if weights else [])]
        status = 0
        try:
            status = tool.main(list(map(str, arguments))) or 0
        except SystemExit as exit:
            status = exit.code
        return (status, *capsys.readouterr())

    return demo


@pytest.fixture
def refuse(demo, tmp_path):
    """Runs the tool, and returns its one line."""

    def refuse(*arguments, **more):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = demo(*arguments, **more)
        assert status == 2 and err.count("\n") == 1 and err.startswith("demo.py: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refuse


def is_drawn_on(picture, image):
    """Whether a picture differs from its enlarged image, and not all over."""
    plain = cv2.resize(image, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    changed = (cv2.absdiff(picture, plain).max(axis=2) > 60).mean()
    return 0.001 < changed < 0.7


def frames(path):
    video = cv2.VideoCapture(str(path))
    found = []
    while (frame := video.read()[1]) is not None:
        found.append(frame)
    return found


# ---- what is drawn -------------------------------------------------------------------------------


def test_a_folder_a_pattern_and_files_become_pictures_of_the_same_names(demo, images, tmp_path):
    for inputs in ([images[0].parent], [images[0].parent / "*.jpg"], images):
        status, out, _ = demo("--input", *inputs, "--output", "drawn", "--score", 0)
        assert status == 0 and "3 of 3 images are drawn into drawn" in out
        drawn = sorted((tmp_path / "drawn").iterdir())
        assert [d.name for d in drawn] == [f"{i.stem}.png" for i in images]
        for picture, image in zip(drawn, images):
            assert is_drawn_on(cv2.imread(str(picture)), cv2.imread(str(image)))
            picture.unlink()


def test_one_image_becomes_a_file(demo, images, tmp_path):
    assert demo("--input", images[0], "--output", "one.jpg", "--score", 0)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["one.jpg"]
    assert cv2.imread("one.jpg").shape == (512, 512, 3)


@pytest.mark.parametrize("name", ["drawn.mp4", "drawn.avi"])
def test_a_video_becomes_a_video_with_its_frames_and_speed(demo, folder, tmp_path, name):
    status, out, _ = demo("--input", folder / "clip.mp4", "--output", name, "--score", 0)
    assert status == 0 and f"{FRAMES} of {FRAMES} images are drawn into {name}" in out
    assert [p.name for p in tmp_path.iterdir()] == [name]
    drawn, given = frames(name), frames(folder / "clip.mp4")
    assert len(drawn) == FRAMES
    assert cv2.VideoCapture(name).get(cv2.CAP_PROP_FPS) == pytest.approx(7)
    assert all(is_drawn_on(picture, frame) for picture, frame in zip(drawn, given))


def test_frames_of_odd_size_keep_their_pixels(tmp_path):
    with destinations.VideoFile(str(tmp_path / "odd.avi"), 5.0) as video:
        video.write("", np.full((65, 63, 3), 255, np.uint8))
    (frame,) = frames(tmp_path / "odd.avi")
    assert frame.shape == (66, 64, 3) and frame.min() > 240


def test_a_comparison_is_a_panel_of_images_of_a_data_set(demo, folder, tmp_path):
    output = ["--output", "panels.png", "--images", 2, "--score", 0]
    status, out, _ = demo("--compare", "shapes_val", *output)
    assert status == 0 and "panels.png is written" in out
    assert [p.name for p in tmp_path.iterdir()] == ["panels.png"]
    picture = cv2.imread("panels.png")
    assert picture.shape[1] > 4 * 384 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_detections_that_are_the_ground_truth_are_drawn_where_it_is(folder):
    register_shapes(str(folder))
    record = DatasetCatalog.get("shapes_val")[0]
    for annotation in record["annotations"]:
        annotation["bbox"] = BoxMode.convert(
            annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
        )
        annotation["bbox_mode"] = BoxMode.XYXY_ABS
    truth = annotations_to_instances(record["annotations"], (SIZE, SIZE), "bitmask")
    masks = truth.gt_masks.tensor
    found = Instances(
        (SIZE, SIZE), pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes, pred_masks=masks,
        scores=torch.full((len(truth),), 0.9),
    )  # fmt: skip
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    metadata = MetadataCatalog.get("shapes_val")
    picture = draw(image, {"instances": found}, metadata, threshold=0.5)
    coloured = np.ptp(cv2.resize(picture, (SIZE, SIZE)).astype(int), axis=2) > 20
    inside = masks.any(dim=0).numpy()
    assert coloured[inside].mean() > 0.7 > 0.5 > coloured[~inside].mean()
    nothing = draw(image, {"instances": found}, metadata, threshold=0.95)
    assert (nothing == 128).all()


def test_a_segmentation_is_drawn(folder):
    logits = torch.zeros(2, 32, 32)
    logits[1, :, 16:] = 1.0
    metadata = MetadataCatalog.get("two_halves").set(
        stuff_classes=["left", "right"], stuff_colors=[(250, 0, 0), (0, 0, 250)]
    )
    picture = draw(np.zeros((32, 32, 3), np.uint8), {"sem_seg": logits}, metadata, 0.5)
    redness = picture[..., 2].astype(int) - picture[..., 0]
    assert redness[:, :256].mean() > 50 and redness[:, 256:].mean() < -50


def test_keypoints_are_drawn_where_they_are():
    keypoints = torch.tensor([[[20.0, 20.0, 1.0], [100.0, 100.0, 1.0], [20.0, 100.0, 0.0]]])
    found = Instances(
        (128, 128), pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 110.0, 110.0]])),
        scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.long), pred_keypoints=keypoints,
    )  # fmt: skip
    metadata = MetadataCatalog.get("three_points").set(
        thing_classes=["thing"], keypoint_names=["a", "b", "c"],
        keypoint_connection_rules=[("a", "b", (0, 255, 0)), ("b", "c", (0, 0, 255))],
    )  # fmt: skip
    image = np.full((128, 128, 3), 128, np.uint8)
    picture = draw(image, {"instances": found}, metadata, threshold=0.5).astype(int)
    line = picture[4 * 60 - 8 : 4 * 60 + 8, 4 * 60 - 8 : 4 * 60 + 8]  # half the way from a to b
    assert (line[..., 1] - line[..., 2]).max() > 100
    assert (picture[..., 0] - picture[..., 2]).max() < 100  # c is not seen, nor is its line


def test_a_panoptic_segmentation_is_drawn():
    segments = torch.zeros(32, 32, dtype=torch.int32)
    segments[:, :16], segments[8:24, 20:28] = 1, 2
    infos = [
        dict(id=1, isthing=False, category_id=0, area=512),
        dict(id=2, isthing=True, category_id=0, score=0.9, instance_id=0),
    ]
    metadata = MetadataCatalog.get("panoptic").set(
        thing_classes=["thing"], thing_colors=[(0, 250, 0)],
        stuff_classes=["stuff"], stuff_colors=[(250, 0, 0)],
    )  # fmt: skip
    output = {
        "panoptic_seg": (segments, infos),
        "instances": Instances((32, 32), scores=torch.ones(0)),
    }
    picture = draw(np.zeros((32, 32, 3), np.uint8), output, metadata, 0.5).astype(int)
    assert (picture[:, :256, 2] - picture[:, :256, 1]).mean() > 50
    assert (picture[:, 256:] > 30).any(axis=2).mean() < 0.6


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["tracing", pytest.param("onnx", marks=needs_onnx)])
def test_an_exported_model_draws_what_the_checkpoint_draws(demo, folder, images, tmp_path, format):
    cfg = load_config(str(INSTANT), options(folder))
    model = Trainer.build_model(cfg).eval()
    model.load_state_dict(torch.load(folder / "model.pth")["model"])
    file = tmp_path / ("model.onnx" if format == "onnx" else "model.ts")
    export_detector(model, file, format, 255 * torch.rand(3, 64, 80))
    found = [
        Predictor(cfg, exported)(cv2.imread(str(images[0])))["instances"]
        for exported in (None, str(file))
    ]
    assert len(found[0]) > 0 and found[0].image_size == (SIZE, SIZE)
    assert torch.equal(found[0].pred_classes, found[1].pred_classes)
    assert (found[0].pred_boxes.tensor - found[1].pred_boxes.tensor).abs().max() < 0.1
    arguments = ["--input", images[0], "--exported", file, "--output", "drawn.png", "--score", 0]
    assert demo(*arguments, weights=False)[0] == 0
    assert is_drawn_on(cv2.imread("drawn.png"), cv2.imread(str(images[0])))


def test_the_model_of_a_checkpoint_is_folded(folder):
    predictor = Predictor(load_config(str(INSTANT), options(folder)))
    kinds = {type(module).__name__ for module in predictor._model.modules()}
    assert "Conv2d" in kinds and not {k for k in kinds if "MABN" in k or "Centralized" in k}


# ---- errors --------------------------------------------------------------------------------------


def test_inputs_that_cannot_be_read_are_refused_in_one_line(refuse, folder, images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "broken.mp4").write_text("no video")
    (tmp_path / "same.jpg").write_bytes(images[0].read_bytes())
    (tmp_path / "same.png").write_bytes(images[0].read_bytes())
    clip = folder / "clip.mp4"
    for inputs, word in [
        (["empty"], "there is no image (*.bmp"),
        (["missing.png"], "there is no missing.png"),
        (["*.tif"], "there is no *.tif"),
        (["broken.png"], "broken.png cannot be read as an image"),
        (["broken.mp4"], "broken.mp4 cannot be opened as a video"),
        ([clip, images[0]], "a video is the only input"),
        (["same.jpg", "same.png"], "would be the picture of same.jpg and of same.png"),
    ]:
        assert word in refuse("--input", *inputs, "--output", "drawn")
    assert "camera 63 cannot be opened" in refuse("--webcam", 63, "--output", "drawn.mp4")


def test_what_exists_is_not_overwritten(refuse, folder, images, tmp_path):
    (tmp_path / "drawn").mkdir()
    files = [tmp_path / "drawn" / f"{images[1].stem}.png", tmp_path / "d.mp4", tmp_path / "d.png"]
    for file in files:
        file.write_text("mine")
    assert "exists" in refuse("--input", images[0].parent, "--output", "drawn")
    assert "d.mp4 exists" in refuse("--input", folder / "clip.mp4", "--output", "d.mp4")
    assert "d.png exists" in refuse("--compare", "shapes_val", "--output", "d.png")
    assert all(file.read_text() == "mine" for file in files)


def test_outputs_that_cannot_be_written_are_refused_in_one_line(
    refuse, folder, images, monkeypatch
):
    clip = ["--input", folder / "clip.mp4", "--output"]
    assert "a video must be named *.mp4 or *.avi" in refuse(*clip, "drawn")
    assert "the folder no does not exist" in refuse(*clip, "no/drawn.mp4")
    assert "is for one image, and there are 3" in refuse("--input", *images, "--output", "d.png")
    assert "must end in .png or .svg" in refuse("--compare", "shapes_val", "--output", "d.jpg")
    monkeypatch.setitem(destinations.CODECS, ".mp4", "zzzz")
    assert "cannot write the codec zzzz" in refuse(*clip, "drawn.mp4")


def test_a_window_without_a_display_is_refused_in_one_line(refuse, images, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "there is no display" in refuse("--input", images[0], "--window")


def test_models_and_options_that_are_wrong_are_refused_in_one_line(refuse, images, tmp_path):
    one = ["--input", images[0], "--output", "drawn.png"]
    (tmp_path / "broken.onnx").write_text("no model")
    (tmp_path / "broken.ts").write_text("no model")
    for arguments, word in [
        ([*one, "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        ([*one, "MODEL.WEIGHTS", "missing.pth"], "missing.pth"),
        ([*one, "--exported", "missing.onnx"], "missing.onnx does not exist"),
        ([*one, "--exported", "broken.ts"], "broken.ts is no model that"),
        ([*one, "--exported", "broken.ts", "MODEL.WEIGHTS", "x"], "only one of the two"),
        (["--compare", "no_set", "--output", "d.png", "--exported", "broken.ts"], "broken.ts"),
        (["--compare", "shapes_val", "--window"], "--compare is drawn into a file"),
        (["--input", images[0]], "--output"),
        (["--output", "drawn"], "--input"),
    ]:
        assert word in refuse(*arguments, weights=False)
    assert "no_set is not registered" in refuse("--compare", "no_set", "--output", "d.png")
    if find_spec("onnxruntime"):
        broken = refuse(*one, "--exported", "broken.onnx", weights=False)
        assert "broken.onnx is no model that" in broken


def test_an_unreadable_image_leaves_the_pictures_before_it(demo, images, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    status, out, err = demo("--input", images[0], "broken.png", "--output", "drawn")
    assert status == 2 and "1 of 2 images are drawn into drawn" in out
    assert "broken.png cannot be read as an image" in err.splitlines()[-1]
    assert [p.name for p in (tmp_path / "drawn").iterdir()] == [f"{images[0].stem}.png"]


def test_ctrl_c_leaves_the_frames_before_it_and_says_how_many(folder, tmp_path):
    video = cv2.VideoWriter(
        str(tmp_path / "long.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (SIZE, SIZE)
    )
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)  # fills buffers
    for _ in range(500):
        video.write(noise)
    video.release()
    command = [
        sys.executable, "-W", "ignore", ROOT / "tools/demo.py", "--config-file", INSTANT,
        "--input", "long.avi", "--output", "drawn.avi", *options(folder),
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env=environment(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not [p for p in tmp_path.rglob("video.avi") if p.stat().st_size > 40_000]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and err.splitlines()[-1] == "demo.py: interrupted"
    drawn = len(frames(tmp_path / "drawn.avi"))
    assert 0 < drawn < 500 and f"{drawn} of 500 images are drawn into drawn.avi" in out
    assert sorted(os.listdir(tmp_path)) == ["drawn.avi", "long.avi"]


def test_an_error_in_a_video_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with destinations.VideoFile(str(tmp_path / "drawn.avi"), 5.0) as video:
            video.write("", np.zeros((64, 64, 3), np.uint8))
            1 / 0  # noqa: B018
    assert video.count == 0 and list(tmp_path.iterdir()) == []


def test_a_full_disk_during_a_video_is_said_and_leaves_nothing(tmp_path):
    program = f"""
        import resource
        import numpy as np
        from mabn_d2.deploy.outputs import VideoFile
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # larger files are an error
        with VideoFile({str(tmp_path / "drawn")!r} + KIND, 5.0) as video:
            for _ in range(100):
                video.write("", noise)
    """
    for kind in destinations.CODECS:
        command = [sys.executable, "-c", textwrap.dedent(program).replace("KIND", repr(kind))]
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
        assert re.search(
            rf"OSError: .*drawn{kind}: only \d+ of 100 frames could be written", done.stderr
        )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wait, keys, more",
    [
        (True, [-1, -1, ord(" ")], True),
        (True, [-1, ord("q")], False),
        (True, [27], False),
        (False, [-1], True),
        (False, [ord("q")], False),
    ],
)
def test_keys_of_a_window(wait, keys, more, monkeypatch):
    shown, waiting = [], list(keys)
    ok = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(destinations.subprocess, "run", lambda *args, **options: ok)
    for name, function in {
        "namedWindow": lambda *args: None,
        "imshow": lambda title, picture: shown.append(picture),
        "waitKey": lambda milliseconds: waiting.pop(0),
        "getWindowProperty": lambda *args: 1.0,
        "destroyAllWindows": lambda: shown.append("closed"),
    }.items():
        monkeypatch.setattr(cv2, name, function)
    with destinations.Window("title", wait) as window:
        assert window.write("", np.zeros((8, 8, 3), np.uint8)) is more
        monkeypatch.setattr(cv2, "getWindowProperty", lambda *args: 0.0)
        waiting.append(-1)
        assert not window.write("", np.zeros((8, 8, 3), np.uint8))  # closed by its frame
    assert window.count == 2 and shown[-1] == "closed" and waiting == []


def test_a_camera_that_stops_ends_the_video_and_one_without_a_frame_is_refused(
    demo, refuse, monkeypatch
):
    class Camera:
        def __init__(self, frames):
            self.frames = [np.full((64, 64, 3), 90, np.uint8)] * frames

        def isOpened(self):
            return True

        def get(self, key):
            return 0.0

        def read(self):
            return (True, self.frames.pop()) if self.frames else (False, None)

    original = cv2.VideoCapture
    for frames in (3, 0):
        fake = lambda source, frames=frames: (  # noqa: E731
            original(source) if isinstance(source, str) else Camera(frames)
        )
        monkeypatch.setattr(cv2, "VideoCapture", fake)
        arguments = ["--webcam", 0, "--output", f"{frames}.avi"]
        if frames:
            assert demo(*arguments)[1].endswith("3 images are drawn into 3.avi\n")
        else:
            assert "camera 0 gives no frame" in refuse(*arguments)


def test_a_class_without_a_name_is_refused():
    found = Instances(
        (8, 8), pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0]])),
        pred_classes=torch.tensor([3]), scores=torch.ones(1),
    )  # fmt: skip
    metadata = MetadataCatalog.get("one_class").set(thing_classes=["thing"])
    with pytest.raises(ValueError, match="the model finds class 3, the data set names 1"):
        draw(np.zeros((8, 8, 3), np.uint8), {"instances": found}, metadata, 0.5)
