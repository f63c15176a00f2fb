"""Statistics of all norms over a population of batches, averaged over workers, or left alone."""

import copy

import pytest
import torch
from detectron2.layers import CycleBatchNormList, NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mabn_d2.engine import update_norm_statistics
from mabn_d2.layers import BRN2d, CenConv2d, GhostBatchNorm2d, MABN2d, MBN2d
from mabn_d2.training import average_norm_statistics, no_recording

from .helpers.norms import assert_same_state, state
from .helpers.workers import run_workers

# Past warm-up after two batches.
MABN = dict(buffer_size=2, warmup_iters=0, renorm_start_iter=0)
NORMS = {
    "MABN": lambda c: MABN2d(c, **MABN),
    "BRN": lambda c: BRN2d(c, r_max_iters=(0, 1), d_max_iters=(0, 1)),
    "MBN": lambda c: MBN2d(c, memory_size=3),
    "ghost": lambda c: GhostBatchNorm2d(c),
    "BN": nn.BatchNorm2d,
    "cumulative BN": lambda c: nn.BatchNorm2d(c, momentum=None),
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "BN per level": lambda c: CycleBatchNormList(1, nn.BatchNorm2d, num_features=c),
    "BN of float64": lambda c: nn.BatchNorm2d(c).double(),
}


def batch(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * (2 + seed) + seed


def statistics_of(norm):
    """The module that holds them."""
    return next(m for m in norm.modules() if getattr(m, "running_var", None) is not None)


def model_with(name):
    """Two norms with a convolution in front, trained for some iterations."""
    model = nn.Sequential(
        CenConv2d(3, 4, 3, padding=1), NORMS[name](4), nn.ReLU(), nn.Conv2d(4, 5, 3), NORMS[name](5)
    ).to(torch.float64 if "float64" in name else torch.float32)  # fmt: skip
    for seed in range(5):
        passes(model, seed)
    return model


def passes(model, seed=0, images=2):
    """Forward and backward."""
    x = batch(seed, images, 3, 6, 6).to(next(model.parameters()).dtype)
    y = model(x)
    (y - torch.linspace(-2, 2, y.numel()).view_as(y)).square().sum().backward()


# ---- the population ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_population_statistics_are_the_moments_in_float64_of_all_that_a_norm_saw(name):
    torch.manual_seed(0)
    norm = NORMS[name](3)
    shift = torch.tensor([0.5, -1.0, 0.0]) if name == "MABN" else torch.zeros(3)
    if name == "MABN":
        norm.running_mean.copy_(shift)
    # RoI heads have batches of any number of regions, and at times none.
    batches = [batch(n, n, 3, 4, 4) for n in (3, 0, 1, 5, 0)]
    if "float64" in name:
        batches = [x.double() for x in batches]
    others = {k: v.clone() for k, v in norm.state_dict().items() if "running" not in k}
    update_norm_statistics(nn.Sequential(norm), batches, len(batches))
    x = torch.cat(batches).double().transpose(0, 1).flatten(1)
    mean, var = x.mean(1), x.var(1, correction=0)
    if name == "MABN":
        mean, var = shift.double(), (x - shift[:, None]).square().mean(1)
    found = statistics_of(norm)
    torch.testing.assert_close(found.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert others and all(torch.equal(v, norm.state_dict()[k]) for k, v in others.items())


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_saw_nothing_is_frozen_or_is_in_evaluation_keeps_its_statistics(name):
    model = model_with(name)
    before = state(model)
    update_norm_statistics(model, [batch(0, 0, 3, 6, 6).to(model[0].weight.dtype)] * 2, 2)
    assert_same_state(before, state(model))
    model[1].eval()
    update_norm_statistics(model, [batch(9, 2, 3, 6, 6).to(model[0].weight.dtype)], 1)
    after = state(model)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert any(key.endswith("running_var") for key in changed)
    assert all(key.startswith("4.") for key in changed)


def test_norms_of_vectors_and_volumes_are_estimated_too():
    for norm, shape in [(nn.BatchNorm1d(3), (5, 3)), (nn.BatchNorm1d(3), (5, 3, 4)),
                        (nn.BatchNorm3d(3), (2, 3, 4, 5, 2))]:  # fmt: skip
        batches = [batch(seed, *shape) for seed in range(3)]
        update_norm_statistics(nn.Sequential(norm), batches, 3)
        x = torch.cat(batches).double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var(1, correction=0), rtol=1e-5,
                                   atol=1e-5)  # fmt: skip


def test_too_few_batches_are_an_error_that_changes_nothing():
    model = model_with("BN")
    before = state(model)
    with pytest.raises(ValueError, match="over 3 batches were asked for, got 2"):
        update_norm_statistics(model, [batch(0, 2, 3, 6, 6)] * 2, 3)
    assert_same_state(before, state(model))
    assert not model[1]._forward_pre_hooks


# ---- passes that are not recorded ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*NORMS, "instance norm"])
def test_no_statistic_moves_in_a_pass_that_is_not_recorded(name):
    if name == "instance norm":
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    else:
        model = model_with(name)
    model.zero_grad()
    before, tensors = state(model), list(model.buffers())
    twin = copy.deepcopy(model)
    with no_recording(model):
        passes(model, 7)
        passes(model, 8)
    passes(twin, 7)
    passes(twin, 8)
    assert_same_state(before, state(model))
    assert all(a is b for a, b in zip(tensors, model.buffers()))
    assert any(not torch.equal(before[key], value) for key, value in twin.named_buffers())
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad)  # they normalize as ever
    twin.load_state_dict(before)
    for net in (model, twin):  # and go on as if there had been no such pass
        passes(net, 9)
    assert_same_state(state(model), state(twin))


@pytest.mark.parametrize("name", NORMS)
def test_a_backward_pass_of_what_was_computed_in_the_block_is_not_recorded_after_it(name):
    model = model_with(name)
    x = batch(3, 2, 3, 6, 6).to(model[0].weight.dtype)
    recorded = model(x)  # its graph holds buffers of the model
    before = state(model)
    with no_recording(model):
        unrecorded = model(x * 2)
    unrecorded.square().sum().backward()
    assert_same_state(before, state(model))
    recorded.square().sum().backward()


def test_an_exception_in_the_block_puts_the_statistics_back():
    model = model_with("MABN")
    before = state(model)
    with pytest.raises(KeyError), no_recording(model):
        passes(model)
        raise KeyError
    assert_same_state(before, state(model))


def test_a_recomputation_in_backward_uses_the_statistics_of_its_own_pass():
    model = model_with("MABN")
    x = batch(3, 2, 3, 6, 6).requires_grad_()
    model.zero_grad()
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    y = checkpoint(model, x, use_reentrant=False)
    with no_recording(model):
        model(x * 3)
    y.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad)
    assert_same_state(state(model), state(twin))


@pytest.mark.parametrize("norm", ["BN", "MABN"])
def test_a_compiled_model_records_nothing_either(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](4))
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        passes(compiled, seed)
    before = state(model)
    with no_recording(compiled):
        passes(compiled, 7)
    assert_same_state(before, state(model))
    passes(compiled, 7)
    assert not torch.equal(before["1.running_var"], model[1].running_var)


def passes_of_a_worker(broadcast_buffers):
    """The state of a worker before and after passes that are not recorded, of both ways to ask for it."""
    states = []
    for through_ddp in (True, False):
        rank = comm.get_rank()
        norms = MABN2d(4, **MABN), MBN2d(4), nn.BatchNorm2d(4)
        model = nn.Sequential(CenConv2d(3, 4, 3), *norms)
        net = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
        passes(net, rank)  # each worker has statistics of its own
        before = state(model)
        with no_recording(net if through_ddp else model):
            passes(net, rank + 5)
            passes(net, rank + 7)
        states.append((before, state(model)))
    return states


@pytest.mark.slow
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_under_ddp_every_worker_keeps_its_own_statistics(broadcast_buffers, tmp_path):
    results = run_workers(2, passes_of_a_worker, tmp_path, broadcast_buffers)
    for states in results:
        for before, after in states:
            assert_same_state(before, after)
    first, second = (states[0][0] for states in results)
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


# ---- averages over workers -----------------------------------------------------------------------


def train_about_a_shift():
    """A MABN about a shift and an MBN; worker 1 has an empty batch in between."""
    rank = comm.get_rank()
    model = nn.ModuleList([MABN2d(3, **MABN), MBN2d(3, memory_size=4)])
    model[0].running_mean.copy_(torch.tensor([0.1, -2.7, 1e-3]))
    for seed in range(4):
        images = 0 if rank == 1 and seed == 2 else 2
        for norm in model:
            norm(
                batch(10 * rank + seed, images, 3, 4, 4).requires_grad_()
            ).square().sum().backward()
    before = state(model)
    average_norm_statistics(model)
    after = state(model)
    model.eval()
    return before, after, [norm(torch.ones(1, 3, 2, 2)).detach() for norm in model]


def test_averages_over_workers_are_about_the_same_shift_and_count_what_all_recorded(tmp_path):
    results = run_workers(2, train_about_a_shift, tmp_path)
    (first, after, out), (second, after_second, out_second) = results
    assert_same_state(after, after_second)
    assert torch.equal(after["0.running_mean"], torch.tensor([0.1, -2.7, 1e-3]))
    for key in ("0.running_var", "1.running_mean", "1.running_var"):
        expected = (first[key].double() + second[key].double()) / 2
        assert torch.equal(after[key], expected.float())
        assert not torch.equal(first[key], second[key])
    for key in ("0.second_moment.count", "0.psi.count", "1.memory.count"):
        assert (first[key], second[key], after[key]) == (4, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(out, out_second))
    # What is evaluated is the formula with the averages.
    x, shift = torch.ones(3, dtype=torch.float64), first["0.running_mean"].double()
    expected = (x - shift) / (after["0.running_var"].double() + 1e-5).sqrt()
    torch.testing.assert_close(out[0][0, :, 0, 0].double(), expected)
