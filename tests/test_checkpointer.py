"""What loading does where the weights and the model differ: in the norm, or in the size of its ring buffers."""

import copy
import logging
import warnings

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torch.nn import functional as F

from mabn_d2 import BRN2d, CenConv2d, MABN2d, MBN2d
from mabn_d2.checkpoint import Checkpointer
from mabn_d2.checkpoint.norms import norm_of, norms_of
from mabn_d2.layers import RingBuffer


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def messages(caplog):
    """What our own code has logged, without the lists of names of fvcore."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("mabn_d2")]


# ------------------------------------------------------------------------------------ another norm

NORMS = ["", "BN", "FrozenBN", "SyncBN", "GN", "MABN", "BRN", "MBN"]


class Convolutions(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = Conv2d(3, 32, 3, norm=get_norm(norm, 32), bias=norm == "", activation=F.relu)
        self.second = Conv2d(32, 32, 3, norm=get_norm(norm, 32), bias=norm == "")

    def forward(self, images):
        return self.second(self.first(images))


class Siblings(nn.Sequential):
    """Norms beside their convolutions, as in torchvision and in maskrcnn-benchmark."""

    def __init__(self, norm):
        convolution = CenConv2d if norm == "MABN" else nn.Conv2d
        norm = get_norm(norm, 32) or nn.Identity()
        super().__init__(convolution(3, 32, 3, bias=False), norm)


class Levels(nn.Module):
    """A head that is shared by feature levels, with statistics per level where Detectron2 has them."""

    def __init__(self, norm):
        super().__init__()
        self.head = RetinaNetHead(
            input_shape=[ShapeSpec(channels=3, stride=8), ShapeSpec(channels=3, stride=16)],
            num_classes=2, num_anchors=1, conv_dims=[32], norm=norm, prior_prob=0.5,
        )  # fmt: skip

    def forward(self, images):
        return torch.cat([x.flatten() for x in self.head([images, images[..., ::2, ::2]])[0]])


def trained(model):
    """Parameters and statistics as training leaves them: none has the value that it began with."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "running_mean" in key or key.endswith("values"):
                value.normal_()
            elif value.dim() == 1:
                value.uniform_(0.5, 1.5)
            elif value.dim() == 4 and not key.endswith("kernel_mean"):
                value.normal_(std=0.2)
            elif key.endswith(("count", "tracked")):
                value.fill_(100)
    return model.eval()


@pytest.mark.parametrize("build", [Convolutions, Siblings, Levels])
@pytest.mark.parametrize("ours", NORMS)
@pytest.mark.parametrize("theirs", NORMS)
@torch.no_grad()
def test_another_norm_is_named_exactly_where_the_function_is_another(
    theirs, ours, build, tmp_path, caplog
):
    source, model = trained(build(theirs)), build(ours).eval()
    Checkpointer(source, str(tmp_path)).save("model")
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    images = torch.randn(2, 3, 16, 16)
    changed = relative_error(model(images), source(images)) > 1e-4
    named = [m for m in messages(caplog) if "weights of another norm" in m]
    assert bool(named) == changed
    if changed:  # in one line
        assert len(named) == 1 and "model.pth" in named[0]
        for norm in (theirs, ours):
            family = {"": "none", "MABN": "MABN", "GN": "GN", "MBN": "MBN"}.get(norm, "BN")
            assert f" {family}" in named[0]


def test_weights_of_a_part_of_a_model_say_nothing_of_the_norms_of_the_rest(tmp_path, caplog):
    torch.save({"first.weight": torch.rand(32, 3, 3, 3)}, tmp_path / "part.pth")
    model = Convolutions("GN")
    Checkpointer(model).load(str(tmp_path / "part.pth"))
    (named,) = [m for m in messages(caplog) if "another norm" in m]
    assert "none for 1 layers that have GN (first.norm)" in named


@pytest.mark.parametrize("norm, warns", [
    ("FrozenBN", False), ("BN", False), ("MABN", False), ("GN", True), ("", True),
])  # fmt: skip
def test_folded_bn_of_caffe2_is_told_from_gn(norm, warns, tmp_path, caplog):
    blobs = {"conv1_w": torch.rand(64, 3, 7, 7).numpy(), "res_conv1_bn_s": torch.rand(64).numpy(),
             "res_conv1_bn_b": torch.rand(64).numpy()}  # fmt: skip
    torch.save({"blobs": blobs}, tmp_path / "R-50.pkl")
    stem = nn.ModuleDict({"stem": nn.ModuleDict(
        {"conv1": Conv2d(3, 64, 7, bias=norm == "", norm=get_norm(norm, 64))}
    )})  # fmt: skip
    Checkpointer(stem).load(str(tmp_path / "R-50.pkl"))
    assert torch.equal(stem["stem"]["conv1"].weight, torch.from_numpy(blobs["conv1_w"]))
    assert any("folded BN" in m for m in messages(caplog)) == warns


def test_norms_are_told_by_the_entries_of_a_file():
    state = nn.ModuleDict({
        "a": MABN2d(4), "b": MBN2d(4), "c": BRN2d(4), "d": nn.GroupNorm(2, 4), "e": nn.Linear(4, 4),
        "f": nn.Conv2d(4, 4, 1), "g": nn.PReLU(4),
    }).state_dict()  # fmt: skip
    assert norms_of(state) == {"a": "MABN", "b": "MBN", "c": "BN", "d": "GN"}
    release = {"bn1.iters": torch.ones(1), "bn1.running_var": torch.ones(1, 4, 1, 1),
               "bn1.weight": torch.ones(4), "bn1.bias": torch.ones(4)}  # fmt: skip
    assert norm_of(release) == "MABN" and norm_of({}) == ""


# ----------------------------------------------------------------------- another size of ring buffer

SMALL_WARMUP = {"warmup_iters": 4, "renorm_start_iter": 6, "momentum": 0.05}


def ring_model(norm, size):
    def layer():
        if norm == "MABN":
            return MABN2d(8, buffer_size=size, **SMALL_WARMUP)
        return MBN2d(8, memory_size=size)

    convolution = CenConv2d if norm == "MABN" else nn.Conv2d
    return nn.Sequential(
        convolution(3, 8, 3), layer(), nn.ReLU(), convolution(8, 8, 3), layer(), nn.Flatten(),
        nn.Linear(8 * 8 * 8, 4),
    ).double()  # fmt: skip


def batch(iteration):
    """Many images, so that the batches' statistics differ little."""
    random = torch.Generator().manual_seed(iteration)
    images = torch.randn(48, 3, 12, 12, generator=random, dtype=torch.float64)
    return images + 0.5, torch.randint(0, 4, (48,), generator=random)


def steps(model, iterations):
    """Output and gradients of each training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for iteration in iterations:
        images, classes = batch(iteration)
        optimizer.zero_grad()
        output = model(images)
        F.cross_entropy(output, classes).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        yield output.detach().clone(), grads
        optimizer.step()


@pytest.mark.parametrize("old, new", [(16, 8), (16, 32), (8, 24), (8, 8)])
@pytest.mark.parametrize("iteration", [3, 60])  # before and after the warm-up
@pytest.mark.parametrize("norm", ["MABN", "MBN"])
@pytest.mark.parametrize("load", ["weights", "resume", "stock", "state dict"])
def test_a_model_with_another_buffer_size_goes_on_as_the_unchanged_one(
    norm, iteration, old, new, load, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    source = ring_model(norm, old)
    list(steps(source, range(iteration)))
    Checkpointer(source, str(tmp_path)).save("model")
    model = ring_model(norm, new)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        if load == "resume":
            Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)
        elif load == "state dict":
            model.load_state_dict(copy.deepcopy(source.state_dict()))
        else:
            cls = DetectionCheckpointer if load == "stock" else Checkpointer
            cls(model).load(str(tmp_path / "model.pth"))
    after = range(iteration, iteration + 3)
    for (output, grad), (expected, expected_grad) in zip(steps(model, after), steps(source, after)):
        assert relative_error(output, expected) < 0.05
        assert relative_error(grad, expected_grad) < 0.05

    said = [m for m in messages(caplog) if "ring buffers" in m]
    number = 4 if norm == "MABN" else 2
    if old == new:
        assert not said and not [w for w in warned if "Ring buffers" in str(w.message)]
    elif load in ("weights", "resume"):  # one line for the whole model
        assert len(said) == 1 and f"{number} resampled from {old} to {new} rows" in said[0]
    else:  # a stock script: Python shows the same warning once
        said = {str(w.message) for w in warned if "Ring buffers" in str(w.message)}
        assert said == {f"Ring buffers were resampled from {old} to {new} rows"}


@pytest.mark.parametrize("old, new", [(16, 8), (16, 32), (8, 24)])
@pytest.mark.parametrize("count", [0, 5, 21])
def test_the_newest_statistics_stay_where_the_count_puts_them(old, new, count, tmp_path):
    source, model = nn.Sequential(RingBuffer(old, 3)), nn.Sequential(RingBuffer(new, 3))
    pushed = torch.randn(count, 3)
    for statistic in pushed:
        source[0].push(statistic[None])
    torch.save(source.state_dict(), tmp_path / "model.pth")
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    kept = min(count, old)
    assert model[0].count == count
    for number in range(count - min(kept, new), count):
        assert torch.equal(model[0].values[number % new], pushed[number])
    older = [row for row in range(new) if row not in {n % new for n in range(count - kept, count)}]
    for row in older:
        mean = pushed[count - kept :].mean(0) if count else torch.zeros(3)
        torch.testing.assert_close(model[0].values[row], mean)


@pytest.mark.parametrize("damage", ["channels", "finite", "a part is missing"])
def test_a_ring_buffer_that_cannot_be_used_starts_anew_as_a_whole(damage, tmp_path, caplog):
    state = ring_model("MABN", 8).state_dict()
    state["1.psi.count"].fill_(40)
    if damage == "channels":
        state["1.psi.values"] = torch.ones(8, 5)
    elif damage == "finite":
        state["1.psi.values"][3, 2] = float("nan")
    else:
        del state["1.psi.values"]
    torch.save(state, tmp_path / "model.pth")
    model = ring_model("MABN", 8)
    model[1].psi.values.fill_(7)
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    assert model[1].psi.count == 0 and not model[1].psi.values.any()
    (said,) = [m for m in messages(caplog) if "ring buffers" in m]
    assert "1 started anew" in said and damage in said


def test_ring_buffers_are_resampled_where_names_are_matched_by_their_ends(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = ring_model("MABN", 16)
    list(steps(source, range(20)))
    torch.save({"model": source.state_dict(), "matching_heuristics": True}, tmp_path / "model.pth")
    model = nn.ModuleDict({"backbone": ring_model("MABN", 8)})
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    ring, expected = model["backbone"][1].psi, source[1].psi
    assert ring.count == 20 and torch.equal(ring.values[19 % 8], expected.values[19 % 16])
    assert len([m for m in messages(caplog) if "ring buffers" in m]) == 1
