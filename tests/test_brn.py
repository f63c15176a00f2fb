"""What Batch Renormalization computes and keeps, and how it is a BN to Detectron2."""

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mabn_d2.engine import update_norm_statistics
from mabn_d2.layers import BRN2d
from mabn_d2.plugin import norm_options

from .helpers.models import decays, small_cfg
from .helpers.norms import DTYPES, FORMATS, as_layout, assert_same_state, state, train
from .helpers.reference import ReferenceBRN

# Past both schedules after a few iterations, and with bounds that are met at times.
SCHEDULE = dict(momentum=0.1, r_max=1.5, r_max_iters=(5, 15), d_max=0.8, d_max_iters=(3, 10))
# Renormalizes from the first iterations on.
EARLY = dict(momentum=0.1, r_max=1.5, r_max_iters=(0, 1), d_max=0.8, d_max_iters=(0, 1))


def random_norm(channels=3, dtype=torch.float64, norm_class=BRN2d, **options):
    norm = norm_class(channels, **options).to(dtype)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    return norm


def reference_of(norm, **options):
    reference = ReferenceBRN(norm.num_features, **options)
    reference.weight = norm.weight.detach().double().numpy()
    reference.bias = norm.bias.detach().double().numpy()
    return reference


def random_batch(step=0, shape=(2, 3, 4, 5), dtype=torch.float64):
    """Input and output's gradient; the input's statistics wander."""
    x, d = torch.randn(2, *shape, dtype=torch.float64)
    scale = 0.3 + 2 * torch.rand(shape[1], 1, 1, dtype=torch.float64)
    return (x * scale + torch.randn(shape[1], 1, 1) + 0.1 * step).to(dtype), d.to(dtype)


def close(actual, expected, bound=1e-10):
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= bound * max(1.0, np.abs(expected).max()), error


def test_every_number_is_that_of_the_formulas_before_during_and_after_the_schedules():
    norm = random_norm(**SCHEDULE)
    reference = reference_of(norm, **SCHEDULE)
    bounds_met, between = set(), 0
    for step in range(40):
        x, d = random_batch(step)
        y, grad_x = train(norm, x, d)
        close(y, reference.forward(x.numpy()))
        expected = reference.backward(d.numpy())
        for actual, value in zip([grad_x, norm.weight.grad, norm.bias.grad], expected):
            close(actual, value)
        close(norm.running_mean, reference.running_mean)
        close(norm.running_var, reference.running_var)
        if step >= 15:
            for value, bounds in [(reference.r, (1 / 1.5, 1.5)), (reference.d, (-0.8, 0.8))]:
                met = [bound for bound in bounds if bound in value]
                bounds_met.update(met)
                between += len(value) - sum((value == bound).sum() for bound in met)
    assert norm.num_batches_tracked == 40
    # The inputs were such that each bound mattered, and that none did.
    assert len(bounds_met) == 4 and between > 10
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
    momentum=st.sampled_from([0.01, 0.5, 1.0]),
    eps=st.sampled_from([1e-5, 1e-2]),
    r_max=st.sampled_from([1.0, 1.5, 3.0]),
    d_max=st.sampled_from([0.0, 0.5, 5.0]),
    schedules=st.tuples(*[st.integers(0, 4), st.integers(1, 5)] * 2),
    steps=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_the_layer_equals_the_formulas_for_any_input_and_option(
    shape, dtype, layout, schedules, steps, seed, **options
):
    torch.manual_seed(seed)
    r_start, r_length, d_start, d_length = schedules
    options["r_max_iters"] = r_start, r_start + r_length
    options["d_max_iters"] = d_start, d_start + d_length
    exact = dtype == torch.float64
    norm = random_norm(shape[1], torch.float64 if exact else torch.float32, **options)
    reference = reference_of(norm, **options)
    for step in range(steps):
        x, d = (as_layout(t, layout) for t in random_batch(step, shape, dtype))
        y, grad_x = train(norm, x, d)
        assert y.dtype == grad_x.dtype == dtype
        if layout != "strided":
            assert y.is_contiguous(memory_format=FORMATS[layout])
        x, d = x.double().numpy(), d.double().numpy()
        expected_y, expected = reference.forward(x), reference.backward(d)
        # What the rounding is relative to: sums of which the result is a difference.
        scale = np.abs(reference.weight * reference.r / reference.sigma_b).max()
        magnitude = max(1.0, scale * np.abs(x).max())
        bound = 1e-12 if exact else DTYPES[dtype]
        close(y, expected_y, bound * magnitude)
        close(grad_x, expected[0], bound * magnitude * max(1.0, scale))
        close(norm.weight.grad, expected[1], bound * magnitude * d.size)
        close(norm.bias.grad, expected[2], bound * d.size)
        close(norm.running_mean, reference.running_mean, 1e-12 if exact else 1e-5)
        close(norm.running_var, reference.running_var, 1e-12 if exact else 1e-5)
    y = norm.eval()(torch.from_numpy(x).to(dtype))
    scale = np.abs(reference.weight).max() / np.sqrt(reference.running_var.min() + options["eps"])
    close(y, reference.evaluate(x), bound * max(1.0, scale * (1 + np.abs(x).max())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [dict(r_max=1.0, d_max=0.0, r_max_iters=(0, 1)),
                                     dict(r_max_iters=(20, 30), d_max_iters=(20, 25))])  # fmt: skip
def test_without_room_for_r_and_d_it_is_bn(options, dtype):
    norm = random_norm(dtype=dtype, **options)
    bn = nn.BatchNorm2d(3, momentum=norm.momentum).to(dtype)
    bn.load_state_dict(norm.state_dict())
    tolerance = (
        dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    )
    for step in range(20):
        x, d = random_batch(step, dtype=dtype)
        for actual, expected in zip(train(norm, x, d), train(bn, x, d)):
            torch.testing.assert_close(actual, expected, **tolerance)
        for actual, expected in zip(norm.parameters(), bn.parameters()):
            torch.testing.assert_close(actual.grad, expected.grad, **tolerance)
        assert list(norm.state_dict()) == list(bn.state_dict())
        for key, expected in bn.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], expected, **tolerance)


@pytest.mark.parametrize("length", [0, 1])
def test_after_the_schedules_start_it_is_bn_no_more(length):
    start = 4
    norm = random_norm(r_max_iters=(start, start + length), d_max_iters=(99, 99))
    bn = random_norm(norm_class=nn.BatchNorm2d, momentum=norm.momentum)
    bn.load_state_dict(norm.state_dict())
    for step in range(start + 2):
        x, d = random_batch(step)
        differ = not torch.allclose(train(norm, x, d)[0], train(bn, x, d)[0], rtol=1e-3)
        assert differ == (step == start + 1)


def test_evaluation_is_that_of_a_bn_with_the_same_state():
    norm = random_norm(**EARLY)
    for step in range(4):
        train(norm, *random_batch(step))
    bn = nn.BatchNorm2d(3).double()
    bn.load_state_dict(norm.state_dict())
    x, _ = random_batch()
    before = state(norm)
    assert torch.equal(norm.eval()(x), bn.eval()(x))
    assert_same_state(before, state(norm))
    scale, shift = (v[:, None, None] for v in norm.scale_and_shift())
    torch.testing.assert_close(norm(x), x * scale + shift, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_the_output_where_r_and_d_stand_at_their_bounds():
    norm = random_norm(**EARLY)
    norm.num_batches_tracked.fill_(9)
    # There r and d are constants of the input, too.
    norm.running_var.copy_(torch.tensor([1e-3, 1e-3, 1e3]))
    norm.running_mean.copy_(torch.tensor([-99.0, 99.0, 9999.0]))
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        twin = copy.deepcopy(norm)  # whose statistics do not move on
        return torch.func.functional_call(twin, {"weight": weight, "bias": bias}, (x,))

    parameters = x, norm.weight, norm.bias
    assert torch.autograd.gradcheck(run, parameters)
    r, d = torch.tensor([[1.5, 1.5, 1 / 1.5], [0.8, -0.8, -0.8]], dtype=torch.float64)
    scale, shift = norm.weight * r, norm.bias + norm.weight * d
    expected = nn.functional.batch_norm(x, None, None, scale, shift, training=True)
    torch.testing.assert_close(run(*parameters), expected, rtol=1e-10, atol=1e-10)


def test_backward_keeps_the_input_and_vectors_only():
    norm, x = random_norm(4, **EARLY), torch.randn(2, 4, 9, 9).double().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 12 * 4


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_an_empty_input_leaves_no_trace(shape):
    norm = random_norm(**EARLY)
    train(norm, *random_batch())
    before = state(norm)
    y, grad_x = train(norm, torch.empty(shape, dtype=torch.float64))
    assert y.shape == grad_x.shape == shape
    assert_same_state(before, state(norm))
    for parameter in norm.parameters():
        assert torch.equal(parameter.grad, torch.zeros(3, dtype=torch.float64))


def test_values_that_are_not_finite_never_enter_a_statistic():
    norm = random_norm(**EARLY)
    for step in range(6):
        x, d = random_batch(step)
        bad = x.clone()
        bad[0, 1, 2, 2] = [np.nan, np.inf, -np.inf][step % 3]
        before = norm.running_mean.clone(), norm.running_var.clone()
        y, grad_x = train(norm, bad, d)
        for now, then in zip((norm.running_mean, norm.running_var), before):
            assert torch.equal(now[1], then[1])  # of the channel
            assert now.isfinite().all() and not torch.equal(now[0], then[0])
        y, grad_x = train(norm, x, d)
        assert y.isfinite().all() and grad_x.isfinite().all()


@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_a_frozen_layer_normalizes_with_running_statistics_and_updates_nothing(input_needs_grad):
    norm = random_norm(dtype=torch.float32, **EARLY)
    for step in range(3):
        train(norm, *random_batch(step, dtype=torch.float32))
    norm.requires_grad_(False)
    before, x = state(norm), random_batch(dtype=torch.float32)[0].requires_grad_(input_needs_grad)
    y = norm(x)
    assert_same_state(before, state(norm))
    scale, shift = (v[:, None, None] for v in norm.scale_and_shift())
    torch.testing.assert_close(y, x * scale + shift)
    if input_needs_grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, scale.expand_as(x))
    torch.testing.assert_close(y.detach(), norm.eval()(x.detach()))


def test_detectron2s_frozen_norm_takes_its_place():
    norm = random_norm(dtype=torch.float32, **EARLY)
    for step in range(3):
        train(norm, *random_batch(step, dtype=torch.float32))
    x = random_batch(dtype=torch.float32)[0]
    expected = norm.eval()(x)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(norm))
    assert type(frozen[0]) is FrozenBatchNorm2d
    torch.testing.assert_close(frozen(x), expected)


def test_a_checkpoint_of_bn_loads_strictly_and_the_other_way_round():
    bn = random_norm(norm_class=nn.BatchNorm2d)
    for step in range(3):
        train(bn, *random_batch(step))
    norm = BRN2d(3).double()
    norm.load_state_dict(bn.state_dict())
    assert_same_state(state(bn), state(norm))
    nn.BatchNorm2d(3).load_state_dict(norm.state_dict())
    x, _ = random_batch()
    assert torch.equal(norm.eval()(x), bn.eval()(x))


def test_an_interrupted_run_continues_exactly():
    batches = [random_batch(step) for step in range(20)]
    norm = random_norm(**SCHEDULE)
    for x, d in batches[:8]:
        train(norm, x, d)
    resumed = BRN2d(3, **SCHEDULE).double()
    resumed.load_state_dict(norm.state_dict())
    for x, d in batches[8:]:
        for a, b in zip(train(norm, x, d), train(resumed, x, d)):
            assert torch.equal(a, b)
    assert_same_state(state(norm), state(resumed))


def test_the_layer_survives_deepcopy_and_pickle():
    norm = random_norm(**EARLY)
    for step in range(3):
        train(norm, *random_batch(step))
    copies = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    x, d = random_batch()
    expected = train(norm, x, d)
    for twin in copies:
        for a, b in zip(train(twin, x, d), expected):
            assert torch.equal(a, b)
        assert_same_state(state(norm), state(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_in_float32_when_the_module_is_cast_to_half(dtype):
    norm = random_norm(dtype=torch.float32, **EARLY)
    for step in range(3):
        train(norm, random_batch(step, dtype=torch.float32)[0] * 300)
    before = norm.running_var.clone()
    norm.to(dtype)
    assert norm.weight.dtype == dtype
    assert norm.running_mean.dtype == torch.float32 and torch.equal(norm.running_var, before)
    assert before.max() > torch.finfo(torch.float16).max  # which would be infinite
    x, d = random_batch(dtype=dtype)
    y, grad_x = train(norm, x * 300, d)
    assert y.dtype == grad_x.dtype == norm.weight.grad.dtype == dtype
    assert y.isfinite().all() and grad_x.isfinite().all() and norm.running_var.isfinite().all()
    assert norm.eval()(x).dtype == dtype


def test_without_affine_the_layer_has_no_parameters():
    norm = BRN2d(3, affine=False).double()
    assert list(norm.parameters()) == [] and not norm.frozen
    y, grad_x = train(norm, *random_batch())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert grad_x.isfinite().all()


def test_precise_statistics_are_the_moments_of_the_population():
    norm = random_norm(**SCHEDULE)
    for step in range(12):
        train(norm, *random_batch(step))
    count = norm.num_batches_tracked.clone()
    batches = [random_batch(step, (images, 3, 4, 4))[0] for step, images in enumerate((1, 2, 5))]
    update_norm_statistics(nn.Sequential(norm), batches, 3)
    everything = torch.cat(batches)
    torch.testing.assert_close(norm.running_mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, everything.var((0, 2, 3), correction=0))
    assert norm.num_batches_tracked == count and norm.momentum == SCHEDULE["momentum"]
    x, d = random_batch()
    twin = BRN2d(3, **SCHEDULE).double()
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(train(norm, x, d)[0], train(twin, x, d)[0])  # renormalizes again


OPTIONS = {
    "MOMENTUM": 0.05, "EPS": 1e-3, "R_MAX": 2.0, "R_MAX_ITERS": (10, 20), "D_MAX": 1.0,
    "D_MAX_ITERS": (5, 15),
}  # fmt: skip


def test_a_model_is_built_with_the_options_of_its_config():
    keys = [item for key, value in OPTIONS.items() for item in (f"MODEL.BRN.{key}", value)]
    for cfg, options in [(small_cfg("BRN", *keys), OPTIONS), (small_cfg("BRN"), {})]:
        default = {key: getattr(BRN2d(1), key.lower()) for key in OPTIONS}
        model = build_model(cfg)
        norms = [m for m in model.modules() if isinstance(m, BRN2d)]
        assert len(norms) > 25 and not any(type(m) is nn.BatchNorm2d for m in model.modules())
        for norm in norms:
            built = {key: getattr(norm, key.lower()) for key in OPTIONS}
            assert built == {**default, **options}


WRONG = [
    ("MOMENTUM", 0.0), ("MOMENTUM", 2.0), ("EPS", 0.0), ("EPS", -1.0), ("R_MAX", 0.5), ("D_MAX", -1.0),
    ("R_MAX_ITERS", (5, 4)), ("R_MAX_ITERS", (-1, 4)), ("R_MAX_ITERS", (5,)), ("D_MAX_ITERS", (5, 4)),
    ("D_MAX_ITERS", (1, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG)
def test_an_option_out_of_its_range_is_refused_by_its_key(key, value):
    cfg = small_cfg("BRN", f"MODEL.BRN.{key}", value)
    for use in (norm_options, build_model):
        with pytest.raises(ValueError, match=rf"^MODEL\.BRN\.{key} must be .*, got "):
            use(cfg)
    with pytest.raises(ValueError, match=f"^BRN2d: {key.lower()} must be .*, got "):
        BRN2d(3, **{key.lower(): value})


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 4, 4)])
def test_a_wrong_input_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"BRN2d expects .*\(N, 3, H, W\), got \(2, "):
        BRN2d(3)(torch.randn(shape))


@pytest.mark.parametrize("options", [[], ["SOLVER.WEIGHT_DECAY_BIAS", None]])
def test_its_parameters_get_the_weight_decay_of_norms(options):
    decay = {}
    for name in ("BN", "BRN"):
        cfg = small_cfg(name, "SOLVER.WEIGHT_DECAY_NORM", 0.01, *options)
        model = build_model(cfg)
        decay[name] = decays(build_optimizer(cfg, model), model)
    assert decay["BN"] == decay["BRN"]
    assert decay["BRN"]["backbone.fpn_lateral2.norm.weight"] == 0.01
    assert decay["BRN"]["backbone.fpn_lateral2.weight"] == cfg.SOLVER.WEIGHT_DECAY
