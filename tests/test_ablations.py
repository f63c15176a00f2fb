"""The norms of the study are the formulas that their docstrings write."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from mabn_d2 import from_bn
from mabn_d2.layers import CenConv2d, CentralizedKernel, MABN2d, options_of
from mabn_d2.plugin import NORM_REGISTRY
from mabn_d2.study import ablations

from .helpers.ablations import registered_ablations
from .helpers.norms import assert_same_state, state, train
from .helpers.reference import ReferenceMBN


@pytest.fixture(autouse=True)
def with_ablations():
    with registered_ablations():
        yield


M, WARMUP, START, CLIP, MOMENTUM, EPS = 3, 5, 8, 1.3, 0.1, 1e-3
OPTIONS = dict(
    eps=EPS, momentum=MOMENTUM, buffer_size=M, warmup_iters=WARMUP, renorm_clip=CLIP,
    renorm_start_iter=START,
)  # fmt: skip
STEPS = 20  # warm-up, buffer, start of r, and more


def channels(vector):
    return vector[None, :, None, None]


def mean(x):
    return x.mean(axis=(0, 2, 3))


class MABN:
    """The formula in float64, from lists of all that was recorded. What an ablation changes is a method."""

    needs_centralized_kernel = True

    def __init__(self, norm):
        self.weight, self.bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        self.mean, self.var = np.zeros(norm.num_features), np.ones(norm.num_features)
        self.t, self.moments, self.gs, self.psis = 0, [], [], []

    def span(self):
        """Of how many batches a moving average is the mean."""
        return 1 if self.t <= M or self.t < WARMUP else M

    psi_span = span

    def is_renormalized(self):
        return self.t > START

    def momentum(self):
        return MOMENTUM

    def next_shift(self, x):
        return self.mean

    def forward(self, x):
        self.t += 1
        shift, self.mean = self.mean, self.next_shift(x)
        x = x - channels(shift)
        self.moments.append(mean(x**2))
        average = np.mean(self.moments[-self.span() :], axis=0)
        self.sigma, sigma = np.sqrt(average + EPS), np.sqrt(self.var + EPS)
        self.r = np.clip(self.sigma / sigma, 1 / CLIP, CLIP)
        if not self.is_renormalized():
            self.r = np.ones_like(self.r)
        self.var = (1 - self.momentum()) * self.var + self.momentum() * average
        self.z = x / channels(self.sigma)
        self.y = channels(self.r) * self.z
        return channels(self.weight) * self.y + channels(self.bias)

    def backward_averages(self, g):
        self.psis.append(mean(g * self.z))
        return 0.0 * self.weight, np.mean(self.psis[-self.psi_span() :], axis=0)

    def backward(self, d):
        """Gradients of x, weight and bias."""
        g = d * channels(self.weight * self.r)
        g_average, psi = self.backward_averages(g)
        grad_x = (g - channels(g_average) - self.z * channels(psi)) / channels(self.sigma)
        return grad_x, (d * self.y).sum(axis=(0, 2, 3)), d.sum(axis=(0, 2, 3))

    def evaluate(self, x):
        scale = self.weight / np.sqrt(self.var + EPS)
        return channels(scale) * (x - channels(self.mean)) + channels(self.bias)


class NoCentralization(MABN):
    needs_centralized_kernel = False


class ForwardOnly(MABN):
    def psi_span(self):
        return 1


class BackwardOnly(MABN):
    psi_span = MABN.span

    def span(self):
        return 1

    def is_renormalized(self):
        return False


class FromStart(MABN):
    def is_renormalized(self):
        return self.t > 1

    def momentum(self):
        return max(MOMENTUM, 1 / self.t)


class CentralizedShift(MABN):
    def next_shift(self, x):
        return (1 - MOMENTUM) * self.mean + MOMENTUM * mean(x)


class Shift(CentralizedShift):
    needs_centralized_kernel = False


class Growing(MABN):
    def span(self):
        return min(M, max(1, self.t // WARMUP))

    psi_span = span


class Rescaled(MABN):
    """In units of the squared norms q of the filters, so that nothing has to be rescaled."""

    def __init__(self, norm):
        super().__init__(norm)
        self.square = None

    def follow(self, kernel):
        if self.square is None:
            self.var = self.var / (kernel**2).sum(axis=(1, 2, 3))
        self.square = (kernel**2).sum(axis=(1, 2, 3))

    def forward(self, x):
        eps = EPS / self.square
        self.t += 1
        self.moments.append(mean(x**2) / self.square)
        average = np.mean(self.moments[-self.span() :], axis=0)
        ratio = np.sqrt((average + eps) / (self.var + eps))
        self.r = np.clip(ratio, 1 / CLIP, CLIP) if self.is_renormalized() else np.ones_like(ratio)
        self.var = (1 - MOMENTUM) * self.var + MOMENTUM * average
        self.sigma = np.sqrt(self.square * (average + eps))
        self.z = x / channels(self.sigma)
        self.y = channels(self.r) * self.z
        return channels(self.weight) * self.y + channels(self.bias)


class Centered(MABN):
    needs_centralized_kernel = False

    def forward(self, x):
        self.t += 1
        self.moments.append((mean(x), x.var(axis=(0, 2, 3))))
        average, var = np.mean(self.moments[-self.span() :], axis=0)
        self.sigma, sigma = np.sqrt(var + EPS), np.sqrt(self.var + EPS)
        self.r = np.clip(self.sigma / sigma, 1 / CLIP, CLIP)
        offset = np.clip((average - self.mean) / sigma, -CLIP, CLIP)
        if not self.is_renormalized():
            self.r, offset = np.ones_like(self.r), 0.0 * offset
        self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * average
        self.var = (1 - MOMENTUM) * self.var + MOMENTUM * var
        self.z = (x - channels(average)) / channels(self.sigma)
        self.y = channels(self.r) * self.z + channels(offset)
        return channels(self.weight) * self.y + channels(self.bias)

    def backward_averages(self, g):
        self.gs.append(mean(g))
        _, psi = super().backward_averages(g)
        return np.mean(self.gs[-self.span() :], axis=0), psi


REPLAYS = {
    "MABN_NoCentralization": (ablations.UncentralizedMABN2d, NoCentralization),
    "MABN_Centered": (ablations.CenteredMABN2d, Centered),
    "MABN_Shift": (ablations.ShiftedMABN2d, Shift),
    "MABN_CentralizedShift": (ablations.CentralizedShiftedMABN2d, CentralizedShift),
    "MABN_ForwardOnly": (ablations.ForwardAverageMABN2d, ForwardOnly),
    "MABN_BackwardOnly": (ablations.BackwardAverageMABN2d, BackwardOnly),
    "MABN_FromStart": (ablations.EarlyRenormMABN2d, FromStart),
    "MABN_Growing": (ablations.GrowingMABN2d, Growing),
}
RESCALED = ablations.RescaledMABN2d, Rescaled  # takes the kernels as well
every_mabn = pytest.mark.parametrize("name", REPLAYS)


def build(name):
    torch.manual_seed(0)
    norm = REPLAYS[name][0](4, **OPTIONS).double()
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    return norm


def batch(step, images=2):
    """Input and output's gradient; scale and mean of each channel wander from step to step."""
    torch.manual_seed(step)
    x, d = torch.randn(2, images, 4, 3, 5, dtype=torch.float64)
    scale, shift = 0.3 + torch.rand(4, 1, 1) * 2, torch.randn(4, 1, 1)
    return x * scale + shift, d + 0.3 * x


def same(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def compare(norm, replay, steps=range(STEPS)):
    for step in steps:
        x, d = batch(step)
        y, grad_x = train(norm, x, d)
        same(y, replay.forward(x.numpy()))
        expected = replay.backward(d.numpy())
        for actual, value in zip([grad_x, norm.weight.grad, norm.bias.grad], expected):
            same(actual, value)
        same(norm.running_mean, replay.mean)
        same(norm.running_var, replay.var)
    x, _ = batch(0)
    same(copy.deepcopy(norm).eval()(x), replay.evaluate(x.numpy()))


@every_mabn
def test_every_number_is_that_of_the_formula(name):
    norm = build(name)
    compare(norm, REPLAYS[name][1](norm))


@pytest.mark.parametrize(
    "options, changes",
    [
        (dict(buffer_size=1, warmup_iters=0, renorm_start_iter=10**9),
         dict(span=lambda self: 1, psi_span=lambda self: 1, is_renormalized=lambda self: False)),
        (dict(renorm_start_iter=10**9), dict(is_renormalized=lambda self: False)),
    ],
    ids=["no moving average", "r off"],
)  # fmt: skip
def test_the_ablations_that_are_options_of_mabn_are_the_formula(options, changes):
    norm = MABN2d(4, **{**OPTIONS, **options}).double()
    compare(norm, type("Ablation", (MABN,), changes)(norm))


def test_a_clip_of_a_million_is_none_in_float32():
    norm = MABN2d(4, **{**OPTIONS, "renorm_clip": 1e6, "renorm_start_iter": WARMUP})
    for step in range(STEPS):
        running = (norm.running_var + EPS).rsqrt()
        x = batch(step)[0].float() * 10.0 ** (step % 5 - 2)
        y = norm(x).detach()
        if step >= WARMUP:  # r cancels the moving average: whatever it is, the output is that of χ̂²
            torch.testing.assert_close(y, x * running[:, None, None], rtol=1e-4, atol=0)


def test_stored_moments_follow_the_scale_of_the_kernel():
    torch.manual_seed(0)
    norm = ablations.RescaledMABN2d(4, **OPTIONS).double()
    replay = Rescaled(norm)
    for step in range(STEPS):
        x, d = batch(step)
        kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        norm.follow(kernel)
        replay.follow(kernel.numpy())
        y, grad_x = train(norm, x, d)
        same(y, replay.forward(x.numpy()))
        for actual, value in zip([grad_x, norm.weight.grad], replay.backward(d.numpy())):
            same(actual, value)
        same(norm.running_var, replay.var * replay.square)


@pytest.mark.parametrize("norm_class", [ablations.RescaledMABN2d, MABN2d])
def test_a_kernel_that_changes_in_scale_alone_changes_nothing(norm_class):
    torch.manual_seed(0)
    model = CenConv2d(3, 4, 3, bias=False, norm=norm_class(4, **{**OPTIONS, "eps": 1e-12})).double()
    for _ in range(STEPS):
        train(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    scaled = copy.deepcopy(model)
    scaled.weight.data *= torch.tensor([1.0, 2.0, 3.0, 0.5]).view(4, 1, 1, 1)
    x, d = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 4, 4, 4).double()
    (y, grad_x), (y_scaled, grad_scaled) = train(model, x, d), train(scaled, x, d)
    follows = norm_class is ablations.RescaledMABN2d
    assert torch.allclose(y, y_scaled) == follows
    assert torch.allclose(grad_x, grad_scaled) == follows
    assert torch.allclose(model.eval()(x), scaled.eval()(x)) == follows


def test_psi_of_imported_weights_warms_up():
    torch.manual_seed(0)
    bn = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=EPS)).double()
    nn.init.uniform_(bn[1].weight, 0.5, 2)
    nn.init.uniform_(bn[1].running_mean)
    nn.init.uniform_(bn[1].running_var, 0.5, 2)
    norm = ablations.PsiWarmUpMABN2d(4, **{**OPTIONS, "renorm_clip": 1e6}).double()
    model = nn.Sequential(CenConv2d(3, 4, 3, bias=False), norm).double()
    from_bn(model, bn)
    psis = []
    for step in range(STEPS):
        x, d = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 4, 4, 4).double()
        norm_input = model[0](x).detach().requires_grad_()
        running = norm.running_var + EPS
        output = norm(norm_input)
        output.backward(d)
        average = norm.second_moment.values.mean(0) + EPS
        z = (norm_input.detach() - channels(norm.running_mean)) / channels(average.sqrt())
        same(output, (channels(norm.weight * (average / running).sqrt()) * z).detach())
        g = d * channels(norm.weight.detach() * (average / running).sqrt())
        psis.append((g * z).mean((0, 2, 3)))
        own = step + 1 <= M or step + 1 < WARMUP
        psi = torch.stack(psis[-1 if own else -M :]).mean(0)
        same(norm_input.grad, (g - z * channels(psi)) / channels(average.sqrt()))
    saved = copy.deepcopy(norm)
    saved.load_state_dict(state(norm))
    assert_same_state(state(saved), state(norm))  # what has warmed up goes on


def test_without_a_convolution_there_is_no_scale_to_follow():
    with pytest.raises(ValueError, match="must be the norm of a convolution"):
        ablations.RescaledMABN2d(4)(batch(0)[0].float())


@every_mabn
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_nothing_had_been(name):
    norm = build(name)
    replay = REPLAYS[name][1](norm)
    compare(norm, replay, range(7))
    resumed = build(name)
    resumed.load_state_dict(state(norm))
    compare(resumed, replay, range(7, STEPS))


@pytest.mark.parametrize("name", REPLAYS)
def test_normalization_batches_are_batches_in_turn(name):
    whole, turns = build(name), build(name)
    whole.norm_batch_size = 2
    for step in range(8):
        x, d = batch(step, images=6)
        y, grad_x = train(whole, x, d)
        turns.zero_grad()
        parts = [part.requires_grad_() for part in x.clone().split(2)]
        outputs = [turns(part) for part in parts]
        for output, part in zip(outputs, d.split(2)):
            output.backward(part)
        same(y, torch.cat(outputs).detach())
        same(grad_x, torch.cat([part.grad for part in parts]))
        same(whole.weight.grad, turns.weight.grad)
    for key, value in whole.state_dict().items():
        if key != "num_batches_tracked":
            same(value, turns.state_dict()[key])


@every_mabn
def test_a_batch_that_is_not_finite_is_not_recorded(name):
    norm = build(name)
    for step in range(STEPS):
        x, d = batch(step)
        train(norm, x / 0 if step in (2, 12) else x, d)
    assert all(value.isfinite().all() for value in norm.state_dict().values())
    assert norm.psi.count == STEPS - 2


def test_a_lag_is_refused_where_it_would_mean_something_else():
    with pytest.raises(ValueError, match="lag must be 0 for an ablation of the averages, got 1"):
        ablations.GrowingMABN2d(4, lag=1)
    with pytest.raises(ValueError, match="lag must be 0 for an ablation of the averages, got 1"):
        ablations.CenteredMABN2d(4, lag=1)


@pytest.mark.parametrize("channel_mean", [0.0, 30.0])
def test_the_moments_are_those_of_float64_also_far_from_the_mean(channel_mean):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8) + channel_mean
    norm = ablations.CenteredMABN2d(4)
    norm(x)
    mean, var = norm.moments.values[0].double().chunk(2)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [*REPLAYS, "MABN_Rescaled"])
def test_its_options_are_those_of_mabn(name):
    ours, mabn = options_of(NORM_REGISTRY.get(name)), options_of(MABN2d)
    assert ours == mabn


# ---- MBN ------------------------------------------------------------------------------------------


def test_the_evaluation_of_mbn_memory_is_the_combination_without_a_current_batch():
    options = dict(memory_size=4, current_weight=0.6, decay=0.7)
    norm = ablations.EvenMemoryMBN2d(4, **options).double()
    reference = ReferenceMBN(4, **options)
    for step in range(10):
        x, d = batch(step)
        y, grad_x = train(norm, x, d)
        same(y, reference.forward(x.numpy()))
        same(grad_x, reference.backward(d.numpy())[0])
        means, variances = (np.stack(s) for s in zip(*reference.memory[:4]))
        weights = 0.7 ** np.arange(len(means))
        weights /= weights.sum()
        reference.mean = weights @ means
        reference.var = weights @ (variances + (means - reference.mean) ** 2)
        same(norm.running_mean, reference.mean)
        same(norm.running_var, reference.var)
        same(copy.deepcopy(norm).eval()(x), reference.evaluate(x.numpy()))


# ---- in Detectron2 --------------------------------------------------------------------------------


def backbone(name):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if name.startswith("MABN"):
        cfg.MODEL[name].BUFFER_SIZE = 2
    torch.manual_seed(0)
    return build_backbone(cfg)


@pytest.mark.parametrize("name", [*REPLAYS, "MABN_Rescaled", "MBN_Memory"])
def test_a_resnet_of_detectron2_trains_with_it_and_loads_its_state(name):
    model = backbone(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = model(torch.randn(2, 3, 32, 32))["res4"].square().mean()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    norm = model.stem.conv1.norm
    if name.startswith("MABN"):
        norm_class, replay = {**REPLAYS, "MABN_Rescaled": RESCALED}[name]
        assert type(norm) is norm_class and norm.psi.count == 2
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        centralized = [isinstance(m, CentralizedKernel) and m.centralized for m in convolutions]
        assert set(centralized) == {replay.needs_centralized_kernel}
    again = backbone(name)
    again.load_state_dict(model.state_dict())
    assert_same_state(state(again), state(model))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again.eval()(x)["res4"], model.eval()(x)["res4"])
