"""What the MABN layer computes and what it keeps."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import MABN2d
from mabn_d2.training import follow_grad_scaler

from .helpers.norms import DTYPES, FORMATS, as_layout, assert_same_state, state, train
from .helpers.reference import ReferenceMABN

TRACE = Path(__file__).parent / "data" / "mabn_reference_trace.npz"


def random_norm(channels, **options):
    norm = MABN2d(channels, **options)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias)
    return norm


def reference_of(norm, **options):
    reference = ReferenceMABN(norm.num_features, **options)
    reference.weight = norm.weight.detach().double().numpy()
    reference.bias = norm.bias.detach().double().numpy()
    return reference


def test_every_number_of_the_authors_released_layer_is_reproduced():
    trace = np.load(TRACE)
    norm = MABN2d(6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(trace["weight"]))
        norm.bias.copy_(torch.from_numpy(trace["bias"]))
    steps = set(trace["steps"].tolist())
    for t in range(1, 1101):
        r = np.random.RandomState(1000 + t)
        scale = np.exp(0.6 * np.sin(t / 37.0 + np.arange(6))) * (1 + 0.3 * np.arange(6))
        x = r.standard_normal((2, 6, 5, 7)) * scale[None, :, None, None] + 0.2 * np.cos(t / 11.0)
        d = r.standard_normal((2, 6, 5, 7)) * 0.1
        y, grad_x = train(norm, torch.from_numpy(x), torch.from_numpy(d))
        if t in steps:
            np.testing.assert_allclose(x, trace[f"{t}/x"], rtol=1e-12)
            computed = {
                "y": y, "gx": grad_x, "gw": norm.weight.grad, "gb": norm.bias.grad,
                "running_var": norm.running_var,
                "buffer_x2_mean": norm.second_moment.values.mean(0),
                "buffer_gz_mean": norm.psi.values.mean(0),
            }  # fmt: skip
            for name, value in computed.items():
                recorded = trace[f"{t}/{name}"].reshape(value.shape)
                np.testing.assert_allclose(value.numpy(), recorded, rtol=0, atol=1e-10)
    norm.eval()
    y = norm(torch.from_numpy(trace["eval/x"])).detach().numpy()
    np.testing.assert_allclose(y, trace["eval/y"], rtol=0, atol=1e-10)
    assert len(steps) > 5


@settings(
    max_examples=500, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)),
    wide=st.sampled_from([0, 0, 0, 2039]),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    buffer_size=st.integers(1, 4),
    warmup_iters=st.integers(0, 5),
    renorm_start_iter=st.integers(0, 6),
    renorm_clip=st.sampled_from([1.0, 1.2, 5.0]),
    lag=st.sampled_from([0, 0, 1]),
    momentum=st.sampled_from([0.02, 0.5, 1.0]),
    eps=st.sampled_from([1e-5, 1e-3]),
    steps=st.integers(1, 8),
    varying_batch=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_layer_equals_the_formulas_for_any_input_and_option(
    shape, wide, dtype, layout, steps, varying_batch, seed, **options
):
    n, channels, height, width = shape
    channels += wide
    torch.manual_seed(seed)
    norm = random_norm(channels, **options)
    if dtype == torch.float64:
        norm.double()
    reference = reference_of(norm, **options)
    scale = torch.rand(channels)[:, None, None] * 3 + 0.1
    for step in range(steps):
        images = n + step % 3 if varying_batch else n
        x = as_layout(torch.randn(images, channels, height, width) * scale * (1 + step), layout)
        x, d = x.to(dtype), torch.randn(x.shape).to(dtype)
        y, grad_x = train(norm, x, d)
        assert y.dtype == x.dtype
        if layout != "strided":
            assert y.is_contiguous(memory_format=FORMATS[layout])
        expected_y = reference.forward(x.double().numpy())
        expected = reference.backward(d.double().numpy())
        close(y, expected_y, DTYPES[dtype])
        # The two terms of the input's gradient may cancel: the error is relative to them.
        term = np.abs(d.double().numpy() * expand(reference.weight * reference.r / reference.chi))
        close(grad_x, expected[0], DTYPES[dtype], term.max())
        close(norm.weight.grad, expected[1], DTYPES[dtype])
        close(norm.bias.grad, expected[2], DTYPES[dtype])
        close(norm.running_var, reference.running_var, max(DTYPES[dtype] / 100, 1e-5)
              if dtype != torch.float64 else 1e-12)  # fmt: skip
    norm.eval()
    close(norm(x), reference.evaluate(x.double().numpy()), DTYPES[dtype])


def close(value, expected, tolerance, scale=1.0):
    error = np.abs(value.detach().double().numpy() - expected).max()
    assert error <= tolerance * max(1.0, scale, np.abs(expected).max()), (error, tolerance)


def expand(vector):
    return vector[None, :, None, None]


def test_the_gradient_is_that_of_the_output_while_statistics_are_the_batchs_own():
    norm = random_norm(3, dtype=None).double()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), parameters, nondet_tol=1e-12)


def test_backward_keeps_the_input_and_vectors_only():
    norm, x = random_norm(4), torch.randn(2, 4, 9, 9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 8 * 4


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_an_empty_input_leaves_no_trace(shape):
    norm = random_norm(3)
    before = state(norm)
    y, grad_x = train(norm, torch.empty(shape))
    assert y.shape == shape and grad_x.shape == shape
    assert_same_state(before, state(norm))
    assert torch.equal(norm.weight.grad, torch.zeros(3))
    assert torch.equal(norm.bias.grad, torch.zeros(3))


def test_statistics_are_float32_where_a_second_moment_overflows_float16():
    norm = random_norm(2)
    x = torch.full((2, 2, 4, 4), 3000.0).half()
    y, grad_x = train(norm, x, torch.ones_like(x))
    assert norm.second_moment.values[0].tolist() == [9e6, 9e6]
    assert y.isfinite().all() and grad_x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_neither_the_type_of_the_statistics_nor_the_result(dtype):
    norm, x = random_norm(4), torch.randn(2, 4, 5, 5).to(dtype)
    twin = copy.deepcopy(norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = train(norm, x)
    assert y.dtype == dtype
    assert norm.running_var.dtype == norm.second_moment.values.dtype == torch.float32
    assert torch.equal(y, train(twin, x)[0])


def test_values_that_are_not_finite_never_enter_a_statistic():
    norm = random_norm(3, buffer_size=2, warmup_iters=0, renorm_start_iter=0)
    for step in range(6):
        x, d = torch.randn(2, 2, 3, 4, 4)
        train(norm, x, d)
        bad = torch.where(torch.rand_like(d) < 0.1, torch.tensor([np.nan, np.inf][step % 2]), d)
        psi = state(norm.psi)
        train(norm, x, bad)
        assert_same_state(psi, state(norm.psi))
        train(norm, bad)
        assert all(value.isfinite().all() for value in norm.state_dict().values())
    y, grad_x = train(norm, x, d)
    assert y.isfinite().all() and grad_x.isfinite().all()


def test_an_overflow_in_the_first_iteration_leaves_finite_statistics():
    norm = random_norm(3)
    train(norm, torch.full((1, 3, 2, 2), np.inf))
    train(norm, torch.full((1, 3, 2, 2), np.nan))
    assert all(value.isfinite().all() for value in norm.state_dict().values())


def scaled_training(scaler, overflow_at=(), follow=True):
    """A small network with a plain GradScaler loop; returns its weights and the skipped steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        MABN2d(8, buffer_size=3, warmup_iters=4, renorm_start_iter=6),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 2, 3),
    )
    if follow:
        follow_grad_scaler(net, scaler)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    skipped = []
    for step in range(40):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = net(x).square().mean() * (float("inf") if step in overflow_at else 1.0)
        if scaler is None:
            if step not in overflow_at:
                loss.backward()
                optimizer.step()
            continue
        before = net[0].weight.clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if torch.equal(before, net[0].weight):
            skipped.append(step)
    return {key: value.clone() for key, value in net.state_dict().items()}, skipped


OVERFLOWS = (0, 1, 2, 11, 25, 26)


@pytest.mark.parametrize("init_scale", [1.0, 2.0**16])
def test_training_under_a_changing_loss_scale_equals_training_without_one(init_scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    scaled, skipped = scaled_training(scaler, OVERFLOWS)
    plain, _ = scaled_training(None, OVERFLOWS)
    assert tuple(skipped) == OVERFLOWS
    assert scaler.get_scale() != init_scale
    for key in plain:
        torch.testing.assert_close(scaled[key], plain[key], rtol=1e-5, atol=1e-6)


def test_without_the_scaler_the_statistic_would_mix_two_units():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    unaware, _ = scaled_training(scaler, follow=False)
    plain, _ = scaled_training(None)
    assert not torch.allclose(unaware["0.weight"], plain["0.weight"], rtol=1e-3)


@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_a_frozen_layer_normalizes_with_running_statistics_and_updates_nothing(input_needs_grad):
    norm = random_norm(3)
    for _ in range(3):
        train(norm, torch.randn(2, 3, 4, 4) * 2)
    norm.requires_grad_(False)
    before, x = state(norm), torch.randn(2, 3, 4, 4, requires_grad=input_needs_grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = norm(x)
    assert not any(t.shape == x.shape for t in saved)
    if input_needs_grad:
        y.sum().backward()
        assert x.grad.isfinite().all()
    assert_same_state(before, state(norm))
    norm.eval()
    torch.testing.assert_close(y.detach(), norm(x.detach()))


def test_evaluation_is_the_map_of_scale_and_shift():
    norm = random_norm(3)
    for _ in range(3):
        train(norm, torch.randn(2, 3, 4, 4) * 2)
    norm.eval()
    before, x = state(norm), torch.randn(2, 3, 4, 4)
    scale, shift = (v[:, None, None] for v in norm.scale_and_shift())
    torch.testing.assert_close(norm(x), x * scale + shift)
    assert_same_state(before, state(norm))


def test_without_affine_the_layer_has_no_parameters():
    norm = MABN2d(3, affine=False)
    assert list(norm.parameters()) == []
    y, grad_x = train(norm, torch.randn(2, 3, 4, 4) * 3)
    torch.testing.assert_close(y.square().mean((0, 2, 3)), torch.ones(3))
    assert grad_x.isfinite().all() and not norm.frozen


def test_several_calls_before_backward_each_leave_one_entry_in_both_buffers():
    norm = random_norm(3, buffer_size=4, warmup_iters=0)
    inputs = [torch.randn(2, 3, 4 + i, 4, requires_grad=True) for i in range(3)]
    outputs = [norm(x) for x in inputs]
    moments = [x.detach().square().mean((0, 2, 3)) for x in inputs]
    torch.testing.assert_close(norm.second_moment.values[:3], torch.stack(moments))
    for y in reversed(outputs):
        y.sum().backward()
    assert norm.second_moment.count == norm.psi.count == 3
    # ψ enters in the order of the backward passes.
    chi = (moments[2] + norm.eps).sqrt()
    psi = norm.weight.detach() * inputs[2].detach().mean((0, 2, 3)) / chi
    torch.testing.assert_close(norm.psi.values[0], psi)


def test_gradient_accumulation_records_every_backward():
    norm = random_norm(3)
    for _ in range(2):
        norm(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert norm.psi.count == 2
    assert norm.weight.grad.abs().sum() > 0


def test_a_training_forward_without_grad_updates_forward_statistics_only():
    norm = random_norm(3)
    with torch.no_grad():
        norm(torch.randn(2, 3, 4, 4))
    assert norm.second_moment.count == 1 and norm.psi.count == 0
    assert not torch.equal(norm.running_var, torch.ones(3))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    options = dict(buffer_size=2, warmup_iters=0, renorm_start_iter=2)
    norm = random_norm(3, **options)
    twin = copy.deepcopy(norm)
    for _ in range(6):
        x, d = torch.randn(2, 2, 3, 4, 4)
        y, grad_x = train(norm, x, d)
        leaf = x.clone().requires_grad_()
        twin.zero_grad()
        z = checkpoint(twin, leaf, use_reentrant=use_reentrant)
        z.backward(d)
        assert torch.equal(y, z) and torch.equal(grad_x, leaf.grad)
        assert torch.equal(norm.weight.grad, twin.weight.grad)
        assert_same_state(state(norm), state(twin))


def test_an_interrupted_run_continues_exactly():
    batches = [torch.randn(2, 3, 4, 4) for _ in range(12)]
    options = dict(buffer_size=3, warmup_iters=4, renorm_start_iter=6)
    norm = random_norm(3, **options)
    for x in batches[:7]:
        train(norm, x)
    resumed = MABN2d(3, **options)
    resumed.load_state_dict(norm.state_dict())
    for x in batches[7:]:
        for a, b in zip(train(norm, x), train(resumed, x)):
            assert torch.equal(a, b)
    assert_same_state(state(norm), state(resumed))


def test_the_layer_survives_deepcopy_and_pickle():
    norm = random_norm(3)
    norm.grad_scaler = torch.amp.GradScaler("cpu")
    train(norm, torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    copies = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    expected = train(norm, x)[0]
    for twin in copies:
        assert torch.equal(train(twin, x)[0], expected)


def test_statistics_stay_in_float32_when_the_module_is_cast_to_half():
    norm = random_norm(3)
    train(norm, torch.randn(2, 3, 4, 4) * 300)
    variance = norm.running_var.clone()
    norm.half()
    assert norm.weight.dtype == torch.float16 and norm.psi.values.dtype == torch.float32
    assert torch.equal(norm.running_var, variance)
    y, grad_x = train(norm, torch.randn(2, 3, 4, 4).half())
    assert y.dtype == grad_x.dtype == norm.weight.grad.dtype == torch.float16
    assert norm.eval()(torch.randn(2, 3, 4, 4).half()).dtype == torch.float16


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 4, 4), (2, 4, 4, 4), (2, 3)])
def test_a_wrong_input_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"expects .*\(N, 3, H, W\), got \(2, "):
        MABN2d(3)(torch.randn(shape))


@pytest.mark.parametrize(
    "options",
    [
        dict(num_features=0), dict(eps=0.0), dict(momentum=0.0), dict(momentum=2),
        dict(buffer_size=0), dict(warmup_iters=-1), dict(renorm_clip=0.5),
        dict(renorm_start_iter=-1), dict(lag=2),
    ],
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        MABN2d(**{"num_features": 3, **options})


@pytest.mark.parametrize("amp", [False, True])
def test_nothing_in_a_training_step_reads_a_value_back_from_the_device(amp):
    # Fake tensors have no values: `.item()` or a branch on one raises.
    with FakeTensorMode():
        norm = MABN2d(3)
        if amp:
            norm.grad_scaler = torch.amp.GradScaler("cpu")
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        norm(x).sum().backward()
        assert x.grad.shape == x.shape
        with pytest.raises(DataDependentOutputException):
            norm.running_var.sum().item()


def test_differentiating_twice_is_refused():
    norm, x = random_norm(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
