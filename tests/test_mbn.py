"""What Memorized Batch Normalization computes and what it remembers."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mabn_d2.engine import update_norm_statistics
from mabn_d2.layers import MBN2d
from mabn_d2.plugin import norm_options
from mabn_d2.training import average_norm_statistics

from .helpers.models import decays, small_cfg, statistics
from .helpers.norms import DTYPES, FORMATS, as_layout, assert_same_state, state, train
from .helpers.reference import ReferenceMBN
from .helpers.workers import run_workers

OPTIONS = dict(memory_size=4, current_weight=0.6, decay=0.7)


def random_norm(channels=3, dtype=torch.float64, norm_class=MBN2d, **options):
    norm = norm_class(channels, **options).to(dtype)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    return norm


def reference_of(norm, **options):
    reference = ReferenceMBN(norm.num_features, **options)
    reference.weight = norm.weight.detach().double().numpy()
    reference.bias = norm.bias.detach().double().numpy()
    return reference


def random_batch(step=0, shape=(2, 3, 4, 5), dtype=torch.float64):
    """Input and output's gradient; the input's statistics wander."""
    x, d = torch.randn(2, *shape, dtype=torch.float64)
    scale = 0.3 + 2 * torch.rand(shape[1], 1, 1, dtype=torch.float64)
    return (x * scale + torch.randn(shape[1], 1, 1) + 0.1 * step).to(dtype), d.to(dtype)


def remembered(norm):
    """The entries of the memory as (mean, variance) of shape (2, C), the newest first."""
    count, values = norm.memory.count.item(), norm.memory.values
    return [values[(count - 1 - i) % len(values)] for i in range(min(count, len(values)))]


def close(actual, expected, bound=1e-10):
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= bound * max(1.0, np.abs(expected).max()), error


@pytest.mark.parametrize("options", [OPTIONS, dict(memory_size=2), dict(decay=1.0), {},
                                     dict(current_weight=1.0, memory_size=3)])  # fmt: skip
def test_every_number_is_that_of_the_formulas_while_the_memory_fills_and_after(options):
    norm = random_norm(**options)
    reference = reference_of(norm, **options)
    for step in range(20):
        x, d = random_batch(step)
        y, grad_x = train(norm, x, d)
        close(y, reference.forward(x.numpy()))
        expected = reference.backward(d.numpy())
        for actual, value in zip([grad_x, norm.weight.grad, norm.bias.grad], expected):
            close(actual, value)
        close(norm.running_mean, reference.mean)
        close(norm.running_var, reference.var)
        memory = remembered(norm)
        assert len(memory) == min(step + 1, reference.k)
        for entry, (mean, var) in zip(memory, reference.memory):
            close(entry[0], mean)
            close(entry[1], var)
    assert norm.memory.count == norm.num_batches_tracked == 20
    assert norm.memory.values.shape == (reference.k, 2, 3)
    x, _ = random_batch()
    close(norm.eval()(x), reference.evaluate(x.numpy()))


@settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    eps=st.sampled_from([1e-5, 1e-2]),
    memory_size=st.integers(1, 6),
    current_weight=st.sampled_from([0.1, 0.5, 1.0]),
    decay=st.sampled_from([1e-3, 0.8, 1.0]),
    varying_batch=st.booleans(),
    steps=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_the_layer_equals_the_formulas_for_any_input_and_option(
    shape, dtype, layout, varying_batch, steps, seed, **options
):
    torch.manual_seed(seed)
    exact = dtype == torch.float64
    norm = random_norm(shape[1], torch.float64 if exact else torch.float32, **options)
    reference = reference_of(norm, **options)
    for step in range(steps):
        images = shape[0] + step % 3 if varying_batch else shape[0]
        x, d = (as_layout(t, layout) for t in random_batch(step, (images, *shape[1:]), dtype))
        y, grad_x = train(norm, x, d)
        assert y.dtype == grad_x.dtype == dtype
        assert norm.memory.values.dtype == (dtype if exact else torch.float32)
        if layout != "strided":
            assert y.is_contiguous(memory_format=FORMATS[layout])
            assert grad_x.is_contiguous(memory_format=FORMATS[layout])
        x, d = x.double().numpy(), d.double().numpy()
        expected_y, expected = reference.forward(x), reference.backward(d)
        # What the rounding is relative to: sums of which the result is a difference.
        scale = (np.abs(reference.weight) / np.sqrt(reference.var + reference.eps)).max()
        magnitude = max(1.0, scale * np.abs(x).max())
        bound = 1e-12 if exact else DTYPES[dtype]
        close(y, expected_y, bound * magnitude)
        close(grad_x, expected[0], bound * magnitude * max(1.0, scale))
        close(norm.weight.grad, expected[1], bound * magnitude * d.size)
        close(norm.bias.grad, expected[2], bound * d.size)
        close(norm.running_mean, reference.mean, 1e-12 if exact else 1e-5)
        close(norm.running_var, reference.var, 1e-12 if exact else 1e-5)
    close(norm.eval()(torch.from_numpy(x).to(dtype)), reference.evaluate(x), bound * magnitude)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_a_memory_of_one_batch_it_is_bn_forward_and_backward(dtype):
    norm = random_norm(dtype=dtype, memory_size=1)
    bn = nn.BatchNorm2d(3).to(dtype)
    bn.load_state_dict({key: norm.state_dict()[key] for key in bn.state_dict()})
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for step in range(5):
        x, d = random_batch(step, dtype=dtype)
        for actual, expected in zip(train(norm, x, d), train(bn, x, d)):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        for actual, expected in zip(norm.parameters(), bn.parameters()):
            torch.testing.assert_close(
                actual.grad, expected.grad, rtol=tolerance, atol=tolerance * 10
            )
    # Running statistics are the memory, not BN's average over time.
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), correction=0))


def effective_weights(norm):
    """The weights that the next batch and those before it will have, measured: the mean is linear in theirs."""
    weights = []
    for index in range(min(norm.memory.count + 1, norm.memory.size)):
        means = []
        for mean in (0.0, 1.0):
            twin = copy.deepcopy(norm)
            x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
            if index == 0:
                x += mean
            else:
                remembered(twin)[index - 1][0] = mean
            twin(x)
            means.append(twin.running_mean.item())
        weights.append(means[1] - means[0])
    return weights


@pytest.mark.parametrize(
    "options", [OPTIONS, {}, dict(memory_size=1), dict(decay=1e-6, memory_size=60)]
)
def test_the_weights_sum_to_one_and_the_newest_has_the_current_weight(options):
    norm = MBN2d(1, **options).double()
    size = norm.memory.size
    for step in range(size + 2):
        if step <= 4 or step >= size - 1:
            weights = effective_weights(norm)
            assert len(weights) == min(step + 1, size)
            assert sum(weights) == pytest.approx(1)
            assert weights[0] == pytest.approx(norm.current_weight if len(weights) > 1 else 1)
            for newer, older in zip(weights[1:], weights[2:]):
                assert older == pytest.approx(norm.decay * newer, abs=1e-12)
        norm(random_batch(step, (2, 1, 3, 3))[0])


def plain_formula(norm, x, weight, bias):
    """The output in plain PyTorch, of which autograd makes the gradient; older batches are constants."""
    older = remembered(norm)[: norm.memory.size - 1]
    w = norm.decay ** torch.arange(1, len(older) + 1, dtype=torch.float64)
    current = norm.current_weight if older else 1.0
    w = torch.cat([w.new_full((1,), current), (1 - current) * w / w.sum()])
    means = torch.stack([x.mean((0, 2, 3)), *(entry[0].clone() for entry in older)])
    variances = torch.stack(
        [x.var((0, 2, 3), correction=0), *(entry[1].clone() for entry in older)]
    )
    mean = w @ means
    var = w @ (variances + (means - mean).square())
    z = (x - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
    return z * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4, 9])
def test_the_gradient_flows_through_the_current_batchs_share_alone(before):
    norm = random_norm(**OPTIONS)
    for step in range(before):
        train(norm, *random_batch(step))
    x, d = random_batch(before, (2, 3, 2, 3))
    x.requires_grad_()
    parameters = x, norm.weight, norm.bias

    def run(x, weight, bias):
        twin = copy.deepcopy(norm)  # whose memory does not move on
        return torch.func.functional_call(twin, {"weight": weight, "bias": bias}, (x,))

    # The memory being constant, this is the whole derivative of the output.
    assert torch.autograd.gradcheck(run, parameters)
    ours = torch.autograd.grad(run(*parameters), parameters, d)
    expected = torch.autograd.grad(plain_formula(norm, *parameters), parameters, d)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_evaluation_is_with_what_the_last_batch_was_normalized_with():
    norm = random_norm(**OPTIONS)
    for step in range(7):
        x, d = random_batch(step)
        before = copy.deepcopy(norm)
        y, _ = train(norm, x, d)
        was = state(norm)
        norm.eval()
        torch.testing.assert_close(norm(x), y, rtol=1e-10, atol=1e-10)
        expected = plain_formula(before, x, norm.weight, norm.bias)
        torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)
        scale, shift = (v[:, None, None] for v in norm.scale_and_shift())
        torch.testing.assert_close(norm(x), x * scale + shift, rtol=1e-10, atol=1e-10)
        assert_same_state(was, state(norm))
        norm.train()


def test_backward_keeps_the_input_and_vectors_only():
    norm = random_norm(4, **OPTIONS)
    for _ in range(2):
        x, saved = torch.randn(2, 4, 9, 9).double().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            norm(x)
        assert any(t.data_ptr() == x.data_ptr() for t in saved)
        assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 12 * 4


@pytest.mark.parametrize("before", [0, 6])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_an_empty_input_leaves_no_trace(shape, before):
    norm = random_norm(**OPTIONS)
    for step in range(before):
        train(norm, *random_batch(step))
    was = state(norm)
    y, grad_x = train(norm, torch.empty(shape, dtype=torch.float64))
    assert y.shape == grad_x.shape == shape
    assert_same_state(was, state(norm))
    for parameter in norm.parameters():
        assert torch.equal(parameter.grad, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("before", [0, 2, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_not_remembered(before, value):
    norm = random_norm(**OPTIONS)
    for step in range(before):
        train(norm, *random_batch(step))
    was, (x, d) = state(norm), random_batch()
    bad = x.clone()
    bad[0, 1, 2, 2] = value
    y, grad_x = train(norm, bad, d)
    now = state(norm)
    assert now.pop("num_batches_tracked") == was.pop("num_batches_tracked") + 1
    for key, expected in was.items():  # to rounding: the same combination, computed again
        torch.testing.assert_close(now[key], expected, rtol=1e-12, atol=1e-12)
    # Of the batch, what is finite was normalized with the memory as constants.
    scale, shift = (v[[0, 2], None, None] for v in norm.scale_and_shift())
    torch.testing.assert_close(y[:, [0, 2]], bad[:, [0, 2]] * scale + shift)
    torch.testing.assert_close(grad_x[:, [0, 2]], d[:, [0, 2]] * scale)
    twin = copy.deepcopy(norm)
    y, grad_x = train(norm, x, d)
    assert y.isfinite().all() and grad_x.isfinite().all()
    assert torch.equal(y, train(twin, x, d)[0])
    assert norm.memory.count == before + 1
    assert all(value.isfinite().all() for value in norm.state_dict().values())


def test_a_batch_that_is_not_finite_is_passed_over_with_a_memory_of_one():
    norm = random_norm(memory_size=1)
    x, d = random_batch()
    train(norm, x, d)
    was = norm.running_mean.clone(), norm.running_var.clone()
    train(norm, torch.full_like(x, np.nan), d)
    assert torch.equal(norm.running_mean, was[0]) and torch.equal(norm.running_var, was[1])
    assert norm.memory.count == 1


@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_a_frozen_layer_normalizes_with_its_memory_and_updates_nothing(input_needs_grad):
    norm = random_norm(**OPTIONS)
    for step in range(3):
        train(norm, *random_batch(step))
    norm.requires_grad_(False)
    before, x = state(norm), random_batch()[0].requires_grad_(input_needs_grad)
    y = norm(x)
    assert_same_state(before, state(norm))
    scale, shift = (v[:, None, None] for v in norm.scale_and_shift())
    torch.testing.assert_close(y, x * scale + shift)
    if input_needs_grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, scale.expand_as(x))
    torch.testing.assert_close(y.detach(), norm.eval()(x.detach()))


def test_detectron2s_frozen_norm_takes_its_place():
    norm = random_norm(dtype=torch.float32, **OPTIONS)
    for step in range(6):
        train(norm, *random_batch(step, dtype=torch.float32))
    x, _ = random_batch(dtype=torch.float32)
    expected = norm.eval()(x)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(norm))
    assert type(frozen[0]) is FrozenBatchNorm2d
    torch.testing.assert_close(frozen(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_in_float32_when_the_module_is_cast_to_half(dtype):
    norm = random_norm(dtype=torch.float32, **OPTIONS)
    for step in range(6):
        train(norm, random_batch(step, dtype=torch.float32)[0] * 300)
    before = norm.memory.values.clone()
    norm.to(dtype)
    assert norm.weight.dtype == dtype and torch.equal(norm.memory.values, before)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert before.max() > torch.finfo(torch.float16).max  # which would be infinite
    x, d = random_batch(dtype=dtype)
    y, grad_x = train(norm, x * 300, d)
    assert y.dtype == grad_x.dtype == norm.weight.grad.dtype == dtype
    assert y.isfinite().all() and grad_x.isfinite().all()
    assert norm.memory.count == 7
    assert norm.eval()(x).dtype == dtype


def test_without_affine_the_layer_has_no_parameters():
    norm, twin = MBN2d(3, affine=False, **OPTIONS).double(), MBN2d(3, **OPTIONS).double()
    assert list(norm.parameters()) == [] and not norm.frozen
    for step in range(6):
        batch = random_batch(step)
        for a, b in zip(train(norm, *batch), train(twin, *batch)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("before", [2, 7])
def test_an_interrupted_run_continues_exactly(before):
    batches = [random_batch(step) for step in range(16)]
    norm = random_norm(**OPTIONS)
    for x, d in batches[:before]:
        train(norm, x, d)
    resumed = MBN2d(3, **OPTIONS).double()
    resumed.load_state_dict(norm.state_dict())
    for x, d in batches[before:]:
        for a, b in zip(train(norm, x, d), train(resumed, x, d)):
            assert torch.equal(a, b)
    assert_same_state(state(norm), state(resumed))


def test_the_state_is_that_of_bn_and_the_memory():
    keys = set(MBN2d(3).state_dict())
    assert keys == {*nn.BatchNorm2d(3).state_dict(), "memory.values", "memory.count"}


def test_weights_trained_with_bn_serve_until_the_first_batch_and_report_the_missing_memory():
    bn = nn.BatchNorm2d(3).double()
    for step in range(3):
        bn(random_batch(step)[0])
    norm = MBN2d(3).double()
    result = norm.load_state_dict(bn.state_dict(), strict=False)
    assert set(result.missing_keys) == {"memory.values", "memory.count"}
    x, _ = random_batch()
    assert torch.equal(norm.eval()(x), bn.eval()(x))
    norm.train()(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def test_without_any_remembered_batch_a_bad_one_is_normalized_with_the_loaded_statistics():
    norm = random_norm(**OPTIONS)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 1, 2)
    before, x = state(norm), random_batch()[0]
    x[0, 1, 2, 2] = np.nan
    y, _ = train(norm, x, x)
    before["num_batches_tracked"] += 1
    assert_same_state(before, state(norm))
    torch.testing.assert_close(y[:, [0, 2]], norm.eval()(x)[:, [0, 2]])


def test_the_layer_survives_deepcopy_and_pickle():
    norm = random_norm(**OPTIONS)
    for step in range(3):
        train(norm, *random_batch(step))
    copies = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    x, d = random_batch()
    expected = train(norm, x, d)
    for twin in copies:
        for a, b in zip(train(twin, x, d), expected):
            assert torch.equal(a, b)
        assert_same_state(state(norm), state(twin))


@pytest.mark.parametrize("with_bn", [False, True])
def test_precise_statistics_are_the_moments_of_the_population_and_leave_the_memory(with_bn):
    model = nn.Sequential(
        random_norm(**OPTIONS), *([nn.BatchNorm2d(3).double()] if with_bn else [])
    )
    norm = model[0]
    for step in range(7):
        model(random_batch(step)[0]).sum().backward()
    before = state(norm)
    batches = [random_batch(step, (images, 3, 4, 4))[0] for step, images in enumerate((1, 2, 5))]
    update_norm_statistics(model, batches, 3)
    everything = torch.cat(batches)
    torch.testing.assert_close(norm.running_mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, everything.var((0, 2, 3), correction=0))
    now = state(norm)
    for key in ("running_mean", "running_var"):
        assert not torch.equal(now.pop(key), before.pop(key))
    assert_same_state(before, now)


def train_unequally():
    """Two layers under DDP; one worker's batch is empty at times."""
    rank = comm.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MBN2d(4, memory_size=3), nn.Conv2d(4, 2, 1))
    model = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(rank)
    for iteration in range(5):
        images = 0 if rank == 1 and iteration % 2 else 1 + rank
        loss = model(torch.randn(images, 3, 6, 6)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = statistics(model)
    average_norm_statistics(model)
    after = statistics(model)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    dist.barrier()
    return before, after, list(model.module.parameters()), statistics(model)


def test_an_empty_batch_of_a_worker_neither_hangs_nor_spoils_the_memories(tmp_path):
    results = run_workers(2, train_unequally, tmp_path)
    (before0, after0, parameters0, later0), (before1, after1, parameters1, later1) = results
    assert all(s.isfinite().all() for s in [*before0, *before1, *after0, *later0, *later1])
    assert not all(torch.equal(a, b) for a, b in zip(before0, before1))
    assert all(torch.equal(a, b) for a, b in zip(after0, after1))
    assert all(torch.equal(a, b) for a, b in zip(parameters0, parameters1))
    for a, b, mean in zip(before0, before1, after0):
        expected = (a + b) / 2 if a.is_floating_point() else torch.minimum(a, b)
        torch.testing.assert_close(mean, expected)
    assert [[s.item() for s in before if s.dim() == 0] for before in (before0, before1)] == [
        [5, 5], [3, 3]
    ]  # fmt: skip


CONFIG_OPTIONS = {"EPS": 1e-3, "MEMORY_SIZE": 3, "CURRENT_WEIGHT": 0.25, "DECAY": 0.5}


def built_options(norm):
    return {"EPS": norm.eps, "MEMORY_SIZE": norm.memory.size,
            "CURRENT_WEIGHT": norm.current_weight, "DECAY": norm.decay}  # fmt: skip


def test_a_model_is_built_with_the_options_of_its_config():
    keys = [item for key, value in CONFIG_OPTIONS.items() for item in (f"MODEL.MBN.{key}", value)]
    for cfg, options in [(small_cfg("MBN", *keys), CONFIG_OPTIONS), (small_cfg("MBN"), {})]:
        model = build_model(cfg)
        norms = [m for m in model.modules() if isinstance(m, MBN2d)]
        assert len(norms) > 25 and not any(type(m) is nn.BatchNorm2d for m in model.modules())
        for norm in norms:
            assert built_options(norm) == {**built_options(MBN2d(1)), **options}


WRONG = [("EPS", 0.0), ("MEMORY_SIZE", 0), ("MEMORY_SIZE", -1), ("CURRENT_WEIGHT", 0.0), ("CURRENT_WEIGHT", 1.5),
         ("DECAY", 0.0), ("DECAY", 1.5)]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG)
def test_an_option_out_of_its_range_is_refused_by_its_key(key, value):
    cfg = small_cfg("MBN", f"MODEL.MBN.{key}", value)
    for use in (norm_options, build_model):
        with pytest.raises(ValueError, match=rf"^MODEL\.MBN\.{key} must be .*, got {value}"):
            use(cfg)
    with pytest.raises(ValueError, match=f"^MBN2d: {key.lower()} must be .*, got {value}"):
        MBN2d(3, **{key.lower(): value})


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 4, 4)])
def test_a_wrong_input_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"MBN2d expects .*\(N, 3, H, W\), got \(2, "):
        MBN2d(3)(torch.randn(shape))


def test_its_parameters_get_the_weight_decay_of_norms():
    decay = {}
    for name in ("BN", "MBN"):
        cfg = small_cfg(name, "SOLVER.WEIGHT_DECAY_NORM", 0.01)
        model = build_model(cfg)
        decay[name] = decays(build_optimizer(cfg, model), model)
    assert decay["BN"] == decay["MBN"]
    assert decay["MBN"]["backbone.fpn_lateral2.norm.weight"] == 0.01
