"""The noise of batch statistics against formulas in float64, and the advice that follows from it."""

import copy
import json
import math
from collections import namedtuple

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mabn_d2 import BRN2d, MABN2d, MBN2d, centralize, set_norm_batch_size
from mabn_d2.data import make_synthetic_coco
from mabn_d2.statistics import Thresholds, advise, diagnose
from mabn_d2.statistics.advice import model_noise
from mabn_d2.statistics.diagnosis import split_batch
from mabn_d2.training import population_statistics

from .helpers import INSTANT, load_tool

NORMS = {
    "BN": nn.BatchNorm2d,
    "MABN": lambda c: MABN2d(c, buffer_size=3, warmup_iters=4, renorm_start_iter=5),
    "BRN": BRN2d,
    "MBN": MBN2d,
    "GN": lambda c: nn.GroupNorm(2, c),
    "FrozenBN": FrozenBatchNorm2d,
}
STEPS = 6


class Network(nn.Sequential):
    def __init__(self, norm):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), NORMS[norm](4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2), NORMS[norm](6),
        )  # fmt: skip
        for layer in (self[1], self[4]):
            nn.init.uniform_(layer.weight, 0.5, 2)
        centralize(self)
        self.double()

    def forward(self, x):
        return super().forward(x).pow(3).mean()


def batches(count=2 * STEPS, images=3):
    generator = torch.Generator().manual_seed(1)
    like = dict(generator=generator, dtype=torch.float64)
    scales = [1 + 3 * torch.rand(images, 1, 1, 1, **like) for _ in range(count)]
    return [scale * torch.randn(images, 3, 8, 8, **like) for scale in scales]


def moments(x):
    x = x.transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, correction=0)


def channels(t):
    return t.transpose(0, 1).flatten(1)


def replay(model, data, layer):
    """Input and gradient of the output of a layer for each of the measured batches, as wholes."""
    model, calls = copy.deepcopy(model), []
    with torch.no_grad(), population_statistics(model):
        for x in data[: STEPS // 2]:
            model(x)
    for norm in (model[1], model[4]):
        norm.eval()

    def keep(_, args, out):
        calls.append([args[0].detach()])
        out.register_hook(lambda d: calls[-1].append(d.clone()))

    model[layer].register_forward_hook(keep)
    for x in data[STEPS // 2 : STEPS // 2 + STEPS]:
        model(x).backward()
    return calls


def rms(t):
    return t.square().mean().sqrt()


@pytest.mark.parametrize("norm", NORMS)
def test_noise_is_that_of_the_formulas_over_batches_and_all_of_them(norm):
    torch.manual_seed(0)
    model, data = Network(norm), batches()
    diagnosis = diagnose(model, data, STEPS)
    assert [layer.layer for layer in diagnosis.layers] == ["1", "4"]
    for layer in diagnosis.layers:
        module = model[int(layer.layer)]
        calls = [[channels(t) for t in call] for call in replay(model, data, int(layer.layer))]
        x, d = (torch.cat(parts, 1) for parts in zip(*calls))
        weight = module.weight.detach()[:, None]
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        std = (var + module.eps).sqrt()
        size = rms(weight * d)

        def statistics(x, d, mean=mean, std=std, size=size, weight=weight):
            m = x.mean(1, keepdim=True)
            y = (x - mean) / std
            return torch.cat(
                [m / std, (x - m).square().mean(1, True) / std**2, (weight * d).mean(1, True) / size,
                 (y * weight * d).mean(1, True) / size], 1,
            )  # fmt: skip

        errors = torch.stack([statistics(*call) - statistics(x, d) for call in calls])
        expected = (errors.square().mean((0, 1)) * STEPS / (STEPS - 1)).sqrt()
        got = layer.noise
        assert list(got.values()) == pytest.approx(expected.tolist(), rel=1e-9)
        assert layer.images == 3 and layer.values == len(x[0]) / STEPS


def test_the_part_between_images_is_what_their_halves_have_in_common():
    data, norm = batches(), nn.BatchNorm2d(3).double()
    model = Flat(norm)
    (layer,) = diagnose(model, data, STEPS).layers
    images = torch.cat(data[STEPS // 2 : STEPS // 2 + STEPS])
    mean, var = (v[:, None, None] for v in moments(images))
    y = (images - mean) / (var + norm.eps).sqrt()
    halves = [y[..., :4], y[..., 4:]]
    for quantity, power in (("mean", 1), ("var", 2)):
        first, second = ((h**power).mean((2, 3)) for h in halves)
        first, second = first - first.mean(0), second - second.mean(0)
        share = (first * second).sum() / ((first + second) / 2).square().sum()
        assert layer.between[quantity] == pytest.approx(max(share.item(), 0), rel=1e-6)


class Flat(nn.Sequential):
    """A norm on the images themselves."""

    def forward(self, x):
        return super().forward(x).pow(2).mean() + sum(p.sum() for p in self.parameters())


def noise_images(count, images, offset):
    """Pixels that are independent of one another, but for an offset of each image."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        pixels = torch.randn(images, 8, 10, 10, generator=generator)
        yield pixels + offset * torch.randn(images, 8, 1, 1, generator=generator)


@pytest.mark.parametrize("offset, images", [(0, 2), (0, 8), (1, 2), (1, 8)])
def test_noise_and_its_part_between_images_are_those_of_the_distribution(offset, images):
    model = Flat(nn.BatchNorm2d(8))
    (layer,) = diagnose(model, noise_images(400, images, offset), 200).layers
    between, within = offset**2 / images, 1 / (100 * images)
    expected = math.sqrt((between + within) / (1 + offset**2))
    assert layer.noise["mean"] == pytest.approx(expected, rel=0.1)
    assert layer.between["mean"] == pytest.approx(between / (between + within), abs=0.1)
    assert layer.standard_error["mean"] == pytest.approx(0.02 * layer.noise["mean"], rel=0.6)


class Head(Flat):
    """A norm on the four quarters of each image, as the regions of a head."""

    def forward(self, x):
        quarters = x.unflatten(3, (2, 5)).unflatten(2, (2, 5)).permute(0, 2, 4, 1, 3, 5)
        return super().forward(quarters.flatten(0, 2))


@pytest.mark.parametrize("offset, share", [(0, 0), (1, 1)])
def test_the_halves_of_an_image_with_several_regions_are_every_other_region(offset, share):
    def images():
        """Regions that differ from one another, and perhaps images that do."""
        for x in noise_images(400, 2, offset):
            yield x + torch.randn(2, 8, 2, 2).repeat_interleave(5, 2).repeat_interleave(5, 3)

    (layer,) = diagnose(Head(nn.BatchNorm2d(8)), images(), 200).layers
    # Of an image's squared error 1/4 is the regions', and 1 that of the offset.
    assert layer.between["mean"] == pytest.approx(share / (share + 0.25), abs=0.1)
    assert layer.images == 2 and layer.values == 200


@pytest.mark.parametrize("norm", NORMS)
def test_the_model_is_afterwards_what_it_was(norm):
    model = Network(norm)
    model(batches(1)[0]).backward()
    before, gradients = copy.deepcopy(model), [copy.copy(p.grad) for p in model.parameters()]
    diagnose(model, batches(), STEPS)
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), gradients))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_normalization_batches_are_what_is_judged():
    model = Network("BN")
    other = copy.deepcopy(model)
    set_norm_batch_size(model, 2)
    data = batches(images=4)
    grouped = diagnose(model, data, STEPS).layers[0]
    halves = [half for x in data for half in x.split(2)]
    alone = diagnose(other, halves, 2 * STEPS).layers[0]
    assert grouped.images == alone.images == 2
    assert grouped.noise["mean"] == pytest.approx(alone.noise["mean"], rel=1e-9)


@pytest.mark.parametrize("norm", ["BN", "MABN"])
def test_outputs_of_training_are_compared_with_those_of_population_statistics(norm):
    make = {"BN": nn.BatchNorm2d, "MABN": lambda c: MABN2d(c, buffer_size=1, momentum=1e-12)}
    module = make[norm](3).double()
    nn.init.uniform_(module.weight, 1, 2)
    nn.init.uniform_(module.bias, 1, 2)
    module.renorm_clip = 1.3  # exceeded by some of the batches
    data = batches()
    (layer,) = diagnose(Flat(module), data, STEPS).layers
    mean, var = moments(torch.cat(data[: STEPS // 2]))
    compared = data[STEPS // 2 + STEPS + STEPS // 4 : 2 * STEPS]
    weight = module.weight.detach()[:, None]
    differences, outputs, clipped = [], [], []
    for x in map(channels, compared):
        if norm == "BN":
            own = [v[:, None] for v in (x.mean(1), (x.var(1, correction=0) + module.eps).sqrt())]
            evaluated = weight * (x - mean[:, None]) / (var + module.eps).sqrt()[:, None]
            trained = weight * (x - own[0]) / own[1]
        else:
            root = (x.square().mean(1) + module.eps).sqrt()
            population = (var + mean.square() + module.eps).sqrt()
            r = (root / population).clamp(1 / 1.3, 1.3)
            clipped.append(((root / population - r).abs() > 0).double().mean().item())
            evaluated = weight * x / population[:, None]
            trained = weight * x * (r / root)[:, None]
        differences.append(trained - evaluated)
        outputs.append(evaluated)
    expected = rms(torch.stack(differences)) / rms(torch.stack(outputs))
    assert layer.train_eval == pytest.approx(expected.item(), rel=1e-6)
    if norm == "BN":
        assert layer.clipped is None
    else:
        assert 0 < layer.clipped < 1
        assert layer.clipped == pytest.approx(sum(clipped) / len(clipped))


def test_a_layer_without_a_gradient_has_the_forward_statistics_only():
    model = Network("BN")
    for parameter in (*model[0].parameters(), *model[1].parameters()):
        parameter.requires_grad_(False)
    first, second = diagnose(model, batches(), STEPS).layers
    assert first.noise["mean"] > 0 and math.isnan(first.noise["grad_dot"])
    assert second.noise["grad_dot"] > 0
    content = json.loads(json.dumps(diagnose(model, batches(), STEPS).as_dict(), allow_nan=False))
    assert content["layers"][0]["noise"]["grad_mean"] is None


# ---- the advice ----------------------------------------------------------------------------------


def advice(offset, images, thresholds, count=100):
    model = Flat(nn.BatchNorm2d(8))
    return advise(diagnose(model, noise_images(2 * count, images, offset), count), thresholds)


def test_images_that_differ_and_images_that_are_alike_get_different_advice():
    thresholds = Thresholds(0.2, 0.25, "made up")
    alike, varied = advice(0, 2, thresholds), advice(1, 2, thresholds)
    assert (alike.norm, varied.norm) == ("BN", "GN")
    assert alike.certainty == varied.certainty == 1
    assert "BN is fine: over 2 images the noise" in alike.sentence
    assert f"GN is advised, or SyncBN over {varied.sync_workers} workers" in varied.sentence
    assert "up to a noise of 0.2, MABN up to 0.25 between images" in varied.sentence
    assert "(made up)" in varied.sentence
    assert alike.noise_interval[0] < alike.noise < alike.noise_interval[1]


def test_so_many_workers_of_syncbn_have_the_noise_with_which_bn_is_fine():
    thresholds = Thresholds(0.6, 9.0, "made up")
    needed = advice(1, 2, thresholds).sync_workers
    assert needed == 3
    assert (
        advice(1, 2 * needed, thresholds).noise
        < 0.6
        < advice(1, 2 * (needed - 1), thresholds).noise
    )


def test_advice_near_a_threshold_is_undecided():
    noise = advice(1, 2, Thresholds(0.15, 9.0, "made up")).noise
    near = advice(1, 2, Thresholds(noise * 1.001, 9.0, "made up"))
    assert 0.3 < near.certainty < 0.9
    assert near.sentence.startswith("Undecided, rather BN: over 2 images")


class NetworkWithAHead(Network):
    """Whose last layers see the batches without a mark only."""

    def forward(self, x):
        x, is_marked = x
        if not is_marked[0]:
            return super().forward(x)
        return self[2](self[1](self[0](x))).pow(3).mean()


def test_steps_in_which_a_layer_saw_nothing_have_no_error_and_keep_their_place():
    torch.manual_seed(0)
    marks = [step % 3 == 1 for step in range(2 * STEPS)]
    data = [(x, torch.tensor([mark] * len(x))) for x, mark in zip(batches(), marks)]
    model = NetworkWithAHead("BN")
    diagnosis = diagnose(model, data, STEPS)
    first, head = diagnosis.layers
    measured = torch.tensor(marks[STEPS // 2 : STEPS // 2 + STEPS])
    assert first.squared_errors.isfinite().all()
    assert torch.equal(head.squared_errors.isnan().all(1), measured)
    assert head.squared_errors[~measured].isfinite().all()
    dropped = [step for step in range(STEPS) if measured[step]]
    weights = torch.ones(2, STEPS, dtype=torch.float64)
    weights[1, dropped] = 5
    both, _ = model_noise(diagnosis._replace(layers=[head]), weights)
    assert both[0] == both[1] > 0


# ---- what it takes -------------------------------------------------------------------------------


def test_a_batch_of_any_shape_is_cut_into_images():
    tensor = torch.arange(6).view(2, 3)
    first, second = split_batch([tensor, {"label": tensor[:, 0]}])
    assert first[0].tolist() == [[0, 1, 2]] and second[1]["label"].tolist() == [3]
    assert split_batch([{"image": tensor}, {"image": tensor}]) == [[{"image": tensor}]] * 2
    sample = namedtuple("sample", "image label")
    first, second = split_batch(sample(tensor, tensor[:, 0]))
    assert isinstance(second, sample) and second.label.tolist() == [3]
    with pytest.raises(ValueError, match=r"members of a batch have \[2, 3\] images"):
        split_batch((tensor, tensor[0]))
    with pytest.raises(ValueError, match="A batch that is a str needs a `split` of its own"):
        split_batch("images")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(model=nn.Sequential(nn.Conv2d(3, 3, 1))), "The model has no BN, SyncBN"),
        (lambda a: a["model"].eval(), "must be in training mode"),
        (lambda a: a.update(steps=3), "steps must be at least 4, got 3"),
        (lambda a: a.update(batches=iter(batches(5))), "6 batches of the same size are needed, got 2"),
        (lambda a: a.update(batches=[]), "3 batches of the same size are needed, got 0"),
        (lambda a: a.update(loss=lambda m, x: m(x).log() * torch.nan), "must be one finite number"),
        (lambda a: a["model"].requires_grad_(False), "The loss has no gradient"),
        (
            lambda a: a.update(model=Flat(nn.BatchNorm2d(3, track_running_stats=False)).double()),
            "0 has no running statistics",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_diagnosed_is_said_in_one_line(change, message):
    arguments = dict(model=Network("BN"), batches=batches(), steps=STEPS)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        diagnose(**arguments)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic_coco(folder, train=8, val=2)
    return folder


@pytest.mark.parametrize("norm", ["MABN", "GN"])
def test_the_tool_diagnoses_a_detector_and_writes_table_picture_and_json(
    shapes, tmp_path, monkeypatch, capsys, norm
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    options = [f"MODEL.{part}.NORM" for part in ("RESNETS", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
    options = [item for key in options for item in (key, norm)]
    load_tool("diagnose_norm").main(
        ["--config-file", str(INSTANT), "--steps", "4", "--out", str(tmp_path), *options]
    )
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    layers = {layer["layer"]: layer for layer in content["layers"]}
    assert layers["roi_heads.box_head.conv1.norm"]["noise"]["grad_dot"] > 0
    assert (layers["backbone.bottom_up.stem.conv1.norm"]["clipped"] is None) == (norm == "GN")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| roi_heads.box_head.conv1.norm |" in out and content["advice"]["sentence"] in out


def test_the_tool_says_in_one_line_what_is_wrong(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_tool("diagnose_norm").main(["--config-file", str(INSTANT), "MODEL.NORMS", "BN"])
    error = capsys.readouterr().err
    assert "error: " in error and "MODEL.NORMS" in error and error.count("\n") == 1
