"""MABN whose moving averages leave the current batch out."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import MABN2d

OPTIONS = dict(
    buffer_size=3, warmup_iters=5, renorm_start_iter=6, renorm_clip=1.3, momentum=0.1, lag=1
)


class Replay:
    """
    The formula in float64, from the list of everything that was recorded. Knows nothing of a ring buffer.

    Batch number t, counted from 1 among those recorded, is in the warm-up while t <= 4: with 5 iterations of
    warm-up and a buffer of 3, as without a lag.
    """

    WARMUP = 4

    def __init__(self, norm):
        self.weight = norm.weight.detach().double().numpy()
        self.running_var, self.moments, self.psis = np.ones(norm.num_features), [], []

    def average(self, recorded, statistic):
        finite = np.isfinite(statistic).all()
        if finite and len(recorded) < self.WARMUP:
            average = statistic
        else:
            average = np.mean(recorded[-3:], axis=0)
        if finite:
            recorded.append(statistic)
        return average

    def forward(self, x):
        """The output without β, and what `backward` needs."""
        x = x.detach().double().numpy()
        average = self.average(self.moments, (x**2).mean(axis=(0, 2, 3)))
        r = np.ones_like(average)
        if len(self.moments) > OPTIONS["renorm_start_iter"]:
            r = np.sqrt((average + 1e-5) / (self.running_var + 1e-5)).clip(1 / 1.3, 1.3)
        self.running_var = 0.9 * self.running_var + 0.1 * average
        z = x / np.sqrt(average + 1e-5)[:, None, None]
        return (self.weight * r)[:, None, None] * z, (z, r, average)

    def backward(self, d, saved):
        z, r, average = saved
        g = d.double().numpy() * (self.weight * r)[:, None, None]
        psi = self.average(self.psis, (g * z).mean(axis=(0, 2, 3)))
        return (g - z * psi[:, None, None]) / np.sqrt(average + 1e-5)[:, None, None]


def build():
    torch.manual_seed(0)
    norm = MABN2d(3, **OPTIONS).double()
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    return norm


def batch(step, images=2):
    generator = torch.Generator().manual_seed(step)
    x, d = torch.randn(2, images, 3, 4, 5, generator=generator, dtype=torch.float64)
    return (x * (1 + step % 4)).requires_grad_(), d


def same(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def test_every_number_is_that_of_the_formula_through_the_end_of_the_warm_up():
    norm = build()
    replay = Replay(norm)
    without = MABN2d(3, **{**OPTIONS, "lag": 0}).double()
    without.load_state_dict(norm.state_dict())
    for step in range(12):
        x, d = batch(step)
        y = norm(x)
        same_as_without = torch.equal(y, without(x))
        assert same_as_without == (step < replay.WARMUP)
        y.backward(d)
        expected, saved = replay.forward(x)
        same(y, expected)
        same(x.grad, replay.backward(d, saved))
        same(norm.running_var, replay.running_var)


@pytest.mark.parametrize("bad_step", [0, 2, 7])
def test_a_batch_that_is_not_finite_leaves_the_averages_what_they_are(bad_step):
    norm = build()
    replay = Replay(norm)
    for step in range(12):
        x, d = batch(step)
        if step == bad_step:
            x.data[0, 0, 0, 0], d[0, 1, 0, 0] = float("inf"), float("nan")
        y = norm(x)
        y.backward(d)
        if (
            step == bad_step and not replay.moments
        ):  # nothing is recorded yet: the mean of an empty buffer is 0
            assert norm.second_moment.count == norm.psi.count == 0
            replay.running_var = norm.running_var.numpy().copy()
            continue
        expected, saved = replay.forward(x)
        grad_x = replay.backward(d, saved)
        if step == bad_step:
            if len(replay.moments) < 3:  # as without a lag, rows that are not filled count as 0
                replay.running_var = norm.running_var.numpy().copy()
            continue
        same(y, expected)
        same(x.grad, grad_x)
    assert norm.second_moment.count == norm.psi.count == 11


def test_two_forwards_before_one_backward_record_in_the_order_in_which_they_happen():
    norm = build()
    replay = Replay(norm)
    for step in range(0, 16, 2):
        (a, d), (b, _) = batch(step), batch(step + 1)
        outputs = norm(a), norm(b)
        (expected_a, saved_a), (expected_b, saved_b) = replay.forward(a), replay.forward(b)
        same(outputs[0], expected_a)
        same(outputs[1], expected_b)
        (outputs[0] * d + outputs[1] * d).sum().backward()
        # Autograd runs the newest first.
        same(b.grad, replay.backward(d, saved_b))
        same(a.grad, replay.backward(d, saved_a))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    norm = build()
    twin = copy.deepcopy(norm)
    for step in range(9):
        (x, d), (z, _) = batch(step), batch(step)
        norm(x).backward(d)
        checkpoint(twin, z, use_reentrant=use_reentrant).backward(d)
        assert torch.equal(x.grad, z.grad)
        for a, b in zip(norm.buffers(), twin.buffers()):
            assert torch.equal(a, b)


def test_an_interrupted_run_continues_exactly():
    norm = build()
    for step in range(7):
        x, d = batch(step)
        norm(x).backward(d)
    resumed = MABN2d(3, **OPTIONS).double()
    resumed.load_state_dict(norm.state_dict())
    for step in range(7, 12):
        (x, d), (z, _) = batch(step), batch(step)
        norm(x).backward(d)
        resumed(z).backward(d)
        assert torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("bad_step", [None, 3])
def test_normalization_batches_are_batches_in_turn(bad_step):
    norm, one_by_one = build(), build()
    norm.norm_batch_size = 2
    for step in range(4):
        x, d = batch(step, images=6)
        if step == bad_step:
            x.data[3, 1] = float("inf")
        z = x.detach().requires_grad_()
        y = norm(x)
        y.backward(d)
        parts = [one_by_one(part) for part in z.split(2)]
        for part, d_part in zip(parts, d.split(2)):
            part.backward(d_part)
        torch.testing.assert_close(y, torch.cat(parts), equal_nan=True)
        torch.testing.assert_close(x.grad, z.grad, equal_nan=True)
        for a, b in zip(norm.buffers(), one_by_one.buffers()):
            torch.testing.assert_close(a, b)
