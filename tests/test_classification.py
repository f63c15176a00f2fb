"""Classification on Fashion-MNIST and ImageNet, and the trainer for LazyConfigs behind it."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Pad, RandomCrop, RandomHorizontalFlip

from mabn_d2 import add_mabn_config
from mabn_d2.checkpoint import Checkpointer
from mabn_d2.classification import AccuracyEvaluator, Classifier
from mabn_d2.classification.data import (
    ClassificationTrainLoader,
    FashionMNIST,
    ImageNet,
    build_classification_test_loader,
)
from mabn_d2.data import make_synthetic_coco, register_shapes
from mabn_d2.engine import LazyTrainer, check_lazy_config, load_lazy_config
from mabn_d2.engine.hooks import DoubleForward
from mabn_d2.layers import BRN2d, GhostBatchNorm2d, MABN2d, MBN2d

from .helpers import CONFIGS, ROOT
from .helpers.fashion_mnist import write_fashion_mnist
from .helpers.runs import assert_same_run, environment, weights
from .helpers.workers import run_workers

MABN = CONFIGS / "FashionMNIST" / "resnet18_mabn_2.py"
CONFIG_FILES = sorted(
    path
    for folder in ("FashionMNIST", "ImageNet")
    for path in (CONFIGS / folder).glob("*.py")
    if path.name != "common.py"
)
# A few iterations on 4 images.
SHORT = ["dataloader.train.total_batch_size=4", "train.max_iter=12", "train.checkpointer.period=4"]


def write_imagenet(root, train, val):
    """Three classes of images that are red, green and blue, portrait and landscape."""
    for split, count in (("train", train), ("val", val)):
        for label, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((40 + 10 * i, 50, 3), np.uint8)
                pixels[..., label] = 200
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_fashion_mnist(root, train=24, val=10)
    write_imagenet(root, train=3, val=2)
    return root


@pytest.fixture(autouse=True)
def datasets_folder(data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))


def command(output, *options, config=MABN):
    return [sys.executable, str(ROOT / "tools/lazyconfig_train_net.py"),
            "--config-file", str(config), *[o for o in options if o.startswith("--")],
            f"train.output_dir={output}", *SHORT,
            *[o for o in options if not o.startswith("--")]]  # fmt: skip


def train(data, output, *options, config=MABN):
    return subprocess.run(
        command(output, *options, config=config),
        env={**environment(data), "PYTHONWARNINGS": "ignore"},  # of the packages underneath
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def table(printed):
    return [line.split("copypaste: ")[1] for line in printed.splitlines() if "copypaste" in line]


def small_config(config, output, *overrides):
    """A config of ImageNet or Fashion-MNIST on the images of this file."""
    small = [f"train.output_dir={output}", "train.device=cpu", *SHORT,
             "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
             "train.reference_world_size=0"]  # fmt: skip
    cfg = load_lazy_config(str(config), [*small, *overrides])
    if "ImageNet" in str(config):
        crop, _ = cfg.dataloader.train.dataset.transform.transforms
        resize, center_crop = cfg.dataloader.test.dataset.transform.transforms
        crop.size = center_crop.size = 32
        resize.size = 40
    return cfg


def tiny_classifier(norm="BN", num_classes=3, **options):
    stages = [[BasicBlock(8, 8, norm=norm)]]
    pixels = {"pixel_mean": [10.0, 20.0, 30.0], "pixel_std": [1.0, 2.0, 4.0]}
    return Classifier(BasicStem(3, 8, norm), stages, num_classes, **pixels, **options)


def random_batch(count, num_classes=3, size=16):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return [{"image": image, "label": i % num_classes} for i, image in enumerate(images)]


# ---- model and evaluator -------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_with_the_target_spread_over_all_classes():
    model = tiny_classifier(label_smoothing=0.1, num_classes=4)
    nn.init.normal_(model.linear.weight)
    batch = random_batch(6, num_classes=4)
    loss = model(batch)["loss_cls"]
    images = torch.stack([entry["image"].double() for entry in batch])
    mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    logits = ResNet.forward(model.double(), (images - mean) / std)["linear"]
    target = torch.full((6, 4), 0.1 / 4).double()
    target[range(6), [entry["label"] for entry in batch]] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_gives_logits_for_each_image_whatever_its_type():
    model = tiny_classifier().eval()
    batch = random_batch(5)
    outputs = model(batch)
    as_float = model([{"image": entry["image"].float()} for entry in batch])
    assert len(outputs) == 5 and outputs[0]["logits"].shape == (3,)
    for a, b in zip(outputs, as_float):
        assert torch.equal(a["logits"], b["logits"])


def test_norms_see_groups_of_the_norm_batch_size_in_training():
    model = tiny_classifier(norm_batch_size=2)
    norm = model.stem.conv1.norm
    assert isinstance(norm, GhostBatchNorm2d)
    seen = []
    norm.register_forward_hook(lambda norm, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(random_batch(6))
    # The stem's ReLU works in place on the output.
    ((x, out),) = seen
    for group in range(0, 6, 2):
        expected = nn.functional.batch_norm(x[group : group + 2], None, None, training=True)
        torch.testing.assert_close(out[group : group + 2], expected.relu(), rtol=1e-4, atol=1e-4)
    assert norm.num_batches_tracked == 3


def test_accuracy_is_that_counted_by_hand():
    evaluator = AccuracyEvaluator()
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # label 0: first
            [9.0, 8, 7, 6, 5, 4, 3],  # label 4: fifth
            [9.0, 8, 7, 6, 5, 4, 3],  # label 5: sixth
            [0.0, 1, 2, 3, 4, 5, 6],  # label 6: first
            [0.0, 1, 2, 3, 4, 5, 6],  # label 0: last
        ]
    )
    evaluator.reset()
    for part in (slice(0, 2), slice(2, 5)):
        evaluator.process(
            [{"label": label} for label in [0, 4, 5, 6, 0][part]],
            [{"logits": row} for row in logits[part]],
        )
    assert evaluator.evaluate() == {"classification": {"top1": 40.0, "top5": 60.0}}
    evaluator.reset()
    evaluator.process([{"label": 1}, {"label": 2}], [{"logits": torch.tensor([1.0, 2, 0])}] * 2)
    assert evaluator.evaluate() == {"classification": {"top1": 50.0, "top5": 100.0}}


def test_accuracy_without_images_is_an_error():
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluator.evaluate()


def evaluate_in_a_worker():
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    labels = [[0, 1, 1], [0]][comm.get_rank()]  # another number in each worker
    evaluator.process(
        [{"label": n} for n in labels], [{"logits": torch.tensor([1.0, 0])}] * len(labels)
    )
    return evaluator.evaluate()


def test_accuracy_counts_the_images_of_all_workers(tmp_path):
    first, second = run_workers(2, evaluate_in_a_worker, tmp_path)
    assert first == {"classification": {"top1": 50.0, "top5": 100.0}}
    assert second is None


# ---- data ----------------------------------------------------------------------------------------


def fashion_mnist(split="train"):
    transforms = [RandomCrop(32, padding=4), RandomHorizontalFlip()]
    return FashionMNIST(split, Compose(transforms if split == "train" else [Pad(2)]))


def take(loader, count):
    """The first batches, as (labels, images)."""
    return [
        ([entry["label"] for entry in batch], torch.stack([entry["image"] for entry in batch]))
        for batch, _ in zip(loader, range(count))
    ]


def assert_same_batches(a, b):
    assert len(a) == len(b)
    for (labels_a, images_a), (labels_b, images_b) in zip(a, b):
        assert labels_a == labels_b and torch.equal(images_a, images_b)


def test_grey_images_get_three_equal_channels_and_are_centered_for_evaluation():
    raw = fashion_mnist("val")
    batches = list(build_classification_test_loader(raw, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    sample = batches[1][1]
    assert sample["label"] == 5
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
    for channel in sample["image"]:
        assert torch.equal(channel[2:30, 2:30], raw.data[5])
        assert channel.sum() == raw.data[5].sum()


def test_images_of_a_folder_come_in_bgr_with_the_labels_of_the_sorted_folders():
    images = ImageNet("val", Compose([Pad(0)]))
    (batch,) = build_classification_test_loader(images, batch_size=6)
    for sample in batch:
        values = sample["image"].flatten(1).float().mean(1).tolist()
        assert values == [200.0 * (sample["label"] == label) for label in (2, 1, 0)]
    assert Counter(sample["label"] for sample in batch) == {0: 2, 1: 2, 2: 2}


def test_training_images_are_shifted_and_flipped_anew_in_each_epoch():
    dataset = fashion_mnist()
    loader = ClassificationTrainLoader(dataset, total_batch_size=24)
    (labels, first), (_, second) = take(loader, 2)
    assert not torch.equal(first, second)
    corners = set()
    for image in first[:, 0]:
        pixels = image.nonzero()
        assert (pixels.amax(0) - pixels.amin(0) == 27).all()
        corners.add(tuple(pixels.amin(0).tolist()))
    assert len(corners) > 5 and corners <= {(y, x) for y in range(5) for x in range(5)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_started_later_gives_the_same_batches_from_there(num_workers):
    dataset = fashion_mnist()
    all_batches = take(ClassificationTrainLoader(dataset, 5), 12)  # 24 images an epoch
    later = ClassificationTrainLoader(dataset, 5, num_workers)
    later.start_iter = 7
    torch.rand(3), np.random.rand(3)  # what happens around it does not matter
    state = torch.get_rng_state()
    assert_same_batches(take(later, 5), all_batches[7:])
    assert torch.equal(torch.get_rng_state(), state)
    later.seed = 1
    assert not torch.equal(take(later, 1)[0][1], all_batches[7][1])


def test_all_workers_together_go_through_the_images_epoch_by_epoch(monkeypatch):
    class Numbers:
        def __len__(self):
            return 18

        def __getitem__(self, index):
            return Image.new("L", (1, 1)), index

    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        loader = ClassificationTrainLoader(Numbers(), total_batch_size=4)
        drawn[rank] = [labels for labels, _ in take(loader, 9)]
        assert all(len(labels) == 2 for labels in drawn[rank])
    iterations = [sorted(drawn[0][i] + drawn[1][i]) for i in range(9)]
    first = sum(iterations[:4], []) + [n for n in iterations[4] if n not in sum(iterations[:4], [])]
    assert sorted(first) == list(range(18))
    assert Counter(sum(iterations, [])) == dict.fromkeys(range(18), 2)
    assert drawn[0][:4] != drawn[0][5:]


def test_loaders_refuse_what_they_cannot_divide_or_do_not_have():
    dataset = fashion_mnist()
    for size in (0, -2):
        with pytest.raises(ValueError, match=r"total_batch_size .* number of workers \(1\), got"):
            ClassificationTrainLoader(dataset, size)
    dataset.data = dataset.data[:0]
    with pytest.raises(ValueError, match="no images to train with in FashionMNIST"):
        ClassificationTrainLoader(dataset, 4)
    with pytest.raises(ValueError, match="no images to evaluate in FashionMNIST"):
        build_classification_test_loader(dataset, 4)


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Output folder and printed text of a run with one worker that nobody stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    done = train(data, output)
    assert done.returncode == 0, done.stdout[-3000:]
    return output, done.stdout


def test_training_writes_what_detectron2_users_expect(uninterrupted):
    output, printed = uninterrupted
    names = {path.name for path in output.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_final.pth",
            "model_0000003.pth"} <= names  # fmt: skip
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert "20 norms, 20 centralized convolutions" in printed
    assert table(printed)[:2] == ["Task: classification", "top1,top5"]
    metrics = (output / "metrics.json").read_text()
    for name in ("total_loss", "lr", "classification/top1", "classification/top5"):
        assert f'"{name}"' in metrics


@pytest.mark.slow
def test_a_killed_run_resumes_as_if_it_had_not_been_killed(data, uninterrupted, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "dataloader.train.num_workers=1"), env=environment(data),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 200
    while not (tmp_path / "model_0000003.pth").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model_final.pth").exists()
    done = train(data, tmp_path, "--resume")
    assert_same_run(uninterrupted[0], tmp_path)
    assert table(done.stdout) == table(uninterrupted[1])


def test_evaluation_alone_prints_the_table_of_the_checkpoint(data, uninterrupted, tmp_path):
    output, printed = uninterrupted
    checkpoint = f"train.init_checkpoint={output / 'model_final.pth'}"
    # The config that a run has saved is a config as well.
    done = train(data, tmp_path, "--eval-only", checkpoint, config=output / "config.yaml")
    assert table(done.stdout) == table(printed)


@pytest.mark.slow
def test_two_workers_train_one_model(data, tmp_path):
    done = train(data, tmp_path, "--num-gpus=2", "--dist-url=auto", "train.device=cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    assert table(done.stdout)[1] == "top1,top5"
    assert weights(tmp_path)["stem.conv1.norm.psi.count"] == 12  # a group of 2 each iteration


def test_a_mistake_is_reported_in_one_line_before_anything_starts(data, tmp_path):
    done = train(data, tmp_path / "output", "train.max_itr=3")
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("lazyconfig_train_net.py: error: ")
    assert "has no key train.max_itr. Similar is train.max_iter." in line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "train.max_itr=3",
            "no key train.max_itr. Similar is train.max_iter. A new key is given as +",
        ),
        ("train.max_iter", "train.max_iter: an override has the form key=value"),
        ("train.max_iter=[1", "train.max_iter=.1: "),
        ("model.stages.norm=MABM", "model.stages.norm must be one of MABN, .*got 'MABM'"),
        ("train.init_checkpoint=no.pth", "train.init_checkpoint: no.pth does not exist"),
        ("dataloader.train.total_batch_size=9", r"total_batch_size .* of workers \(2\), got 9"),
        ("dataloader.train.total_batch_size=0", r"total_batch_size .* of workers \(2\), got 0"),
        ("lr_multiplier.num_updates='${train.length}'", "train.length"),
        (
            "+dataloader.train.dataset.root=/no",
            "^/no/FashionMNIST/raw/.* `make datasets/fashion-mnist`",
        ),
    ],
)
def test_mistakes_in_a_config_are_named(override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        cfg = load_lazy_config(str(MABN), [override])
        check_lazy_config(cfg, num_workers=2, eval_only=False, resume=False)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'no.py' is not a file"):
        load_lazy_config("no.py", [])
    (tmp_path / "empty.py").write_text("train = dict(max_iter=1)")
    with pytest.raises(ValueError, match="does not define model, dataloader, optimizer, lr_multip"):
        load_lazy_config(str(tmp_path / "empty.py"), [])
    imagenet = str(CONFIGS / "ImageNet" / "resnet50_bn.py")
    elsewhere = f"+dataloader.train.dataset.root={tmp_path}"
    cfg = load_lazy_config(imagenet, [elsewhere])
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/imagenet/train does not exist"):
        check_lazy_config(cfg, num_workers=8, eval_only=False, resume=False)
    check_lazy_config(cfg, num_workers=8, eval_only=True, resume=False)


# ---- experiments ---------------------------------------------------------------------------------

# On ImageNet, with a norm batch of 2: what a norm does in an iteration takes place in its 16 groups.
NORMS = {
    "bn": (nn.BatchNorm2d, 0, {"momentum": 0.1}),
    "bn_2": (GhostBatchNorm2d, 2, {"momentum": 1 - 0.9 ** (1 / 16)}),
    "brn_2": (BRN2d, 2, {"momentum": 1 - 0.99 ** (1 / 16), "r_max": 3, "d_max": 5,
                         "r_max_iters": (80000, 640000), "d_max_iters": (80000, 400000)}),
    "mabn_2": (MABN2d, 2, {"momentum": 1 - 0.98 ** (1 / 16), "warmup_iters": 16,
                           "renorm_start_iter": 1600, "renorm_clip": 5}),
    "mbn_2": (MBN2d, 2, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_imagenet_experiments_have_the_recipe_of_the_paper(name):
    cfg = load_lazy_config(str(CONFIGS / "ImageNet" / f"resnet50_{name}.py"), [])
    assert cfg.dataloader.train.total_batch_size == 8 * 32
    assert cfg.train.max_iter == 120 * 5000
    assert cfg.model.label_smoothing == 0.1
    assert cfg.train.init_checkpoint == ""

    with torch.device("meta"):
        model = instantiate(cfg.model)
    norm_class, norm_batch_size, options = NORMS[name]
    norms = [m for m in model.modules() if hasattr(m, "running_var")]
    assert len(norms) == 53
    for norm in norms:
        assert type(norm) is norm_class and getattr(norm, "norm_batch_size", 0) == norm_batch_size
        assert {key: getattr(norm, key) for key in options} == options
    if name == "mabn_2":
        assert norms[0].psi.size * norm_batch_size == 32

    params = {**cfg.optimizer.params, "model": model}
    optimizer = instantiate({**cfg.optimizer, "params": params})
    assert type(optimizer) is torch.optim.SGD
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)
    schedule = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    for iteration, lr in [(0, 0.1), (149999, 0.1), (150000, 0.01), (299999, 0.01), (300000, 1e-3),
                          (449999, 1e-3), (450000, 1e-4), (599999, 1e-4)]:  # fmt: skip
        schedule.last_epoch = iteration
        for group_lr in schedule.get_lr():
            assert group_lr == pytest.approx(lr)


def test_experiments_on_fashion_mnist_have_the_learning_rate_for_their_batch():
    imagenet = load_lazy_config(str(CONFIGS / "ImageNet" / "resnet50_bn.py"), [])
    cfg = load_lazy_config(str(CONFIGS / "FashionMNIST" / "resnet18_bn.py"), [])
    images, more_images = (c.dataloader.train.total_batch_size for c in (cfg, imagenet))
    assert (images, more_images) == (32, 256)
    assert cfg.optimizer.lr / images == imagenet.optimizer.lr / more_images
    assert (cfg.optimizer.lr, cfg.train.max_iter * images) == (0.0125, 60000)


def test_weights_start_as_the_papers():
    stages = ResNet.make_default_stages(18)
    model = Classifier(BasicStem(), stages, 10, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    for name, weight in model.named_parameters():
        if weight.dim() == 4:
            fan_out = weight.shape[0] * weight[0, 0].numel()
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


@pytest.mark.parametrize("config", CONFIG_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_experiment_trains_and_evaluates(config, tmp_path):
    trainer = LazyTrainer(small_config(config, tmp_path))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.max_iter = 2
    trainer.train()
    after = trainer.model.state_dict()
    for key, value in after.items():
        assert value.isfinite().all(), key
        if value.dim() == 4 and key.endswith("weight"):
            assert not torch.equal(value, before[key]), key
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert 0 <= last["classification/top1"] <= last["classification/top5"] <= 100
    doubled = isinstance(trainer._hooks[0], DoubleForward)
    assert doubled == ("mbn" in config.name and "without_df" not in config.name)


# ---- from classification to detection ------------------------------------------------------------

DETECTORS = [
    ("FashionMNIST/resnet18_{}.py", "quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml"),
    ("ImageNet/resnet50_{}.py", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_mabn.yaml"),
]


def classifier_and_detector(config, detector_config, norm, output):
    """A classifier with statistics of its own, its checkpoint, and a detector."""
    trainer = LazyTrainer(small_config(CONFIGS / config.format(norm), output))
    trainer.max_iter = 1
    del trainer.cfg.dataloader.evaluator
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / detector_config))
    cfg.MODEL.DEVICE = "cpu"
    return trainer.model, str(output / "model_final.pth"), build_model(cfg)


@pytest.mark.parametrize("config, detector_config", DETECTORS)
def test_a_checkpoint_is_the_start_of_a_detector(config, detector_config, tmp_path, caplog):
    classifier, file, detector = classifier_and_detector(
        config, detector_config, "mabn_2", tmp_path
    )
    states = []
    for checkpointer in (Checkpointer(detector), DetectionCheckpointer(detector)):
        for tensor in detector.state_dict().values():
            tensor.zero_()
        checkpointer.load(file, checkpointables=[])
        states.append({k: v.clone() for k, v in detector.backbone.bottom_up.state_dict().items()})
    assert "another norm" not in caplog.text
    expected = classifier.state_dict()
    assert set(states[0]) == set(states[1]) == {k for k in expected if not k.startswith("linear.")}
    assert any("psi.values" in key for key in states[0])
    for state in states:
        for key, value in state.items():
            assert torch.equal(value, expected[key]), key
    # Nothing but the weights tells the two networks apart.
    assert torch.equal(detector.pixel_mean, classifier.pixel_mean)
    assert torch.equal(detector.pixel_std, classifier.pixel_std)
    for name, module in detector.backbone.bottom_up.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.stride == classifier.get_submodule(name).stride


def test_a_classifier_with_bn_is_not_taken_for_one_with_mabn(tmp_path, caplog):
    _, file, detector = classifier_and_detector(*DETECTORS[0], "bn", tmp_path)
    Checkpointer(detector, weights_import="as_is").load(file, checkpointables=[])
    assert f"{file} holds weights of another norm: BN for 20 layers that have MABN" in caplog.text


def test_a_lazy_config_of_a_detector_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_synthetic_coco(tmp_path, layout="shapes", train=4, val=2, size=64)
    register_shapes()
    file = tmp_path / "detector.py"
    file.write_text(DETECTOR)
    options = [
        "train.max_iter=3",
        "train.checkpointer.period=2",
        f"train.output_dir={tmp_path}/out",
    ]
    cfg = load_lazy_config(str(file), options)
    check_lazy_config(cfg, num_workers=2, eval_only=False, resume=False)
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    printed = (tmp_path / "out" / "metrics.json").read_text()
    assert "bbox/AP" in printed and '"loss_mask"' in printed
    assert "matching_heuristics" not in torch.load(tmp_path / "out" / "model_final.pth")
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = LazyTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    cfg.dataloader.test.dataset.names = "shapes_tset"
    with pytest.raises(ValueError, match="dataloader.test.dataset.names: no data .* 'shapes_tset'"):
        check_lazy_config(cfg, num_workers=2, eval_only=True, resume=False)


DETECTOR = """
from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "MABN"
model.roi_heads.num_classes = 6
model.roi_heads.batch_size_per_image = 8
model.proposal_generator.post_nms_topk = (16, 8)
dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
optimizer.lr = 0.001
"""
