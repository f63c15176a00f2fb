"""Normalization batches: a norm that sees its input as groups of images in turn."""

import copy

import pytest
import torch
from detectron2.modeling import ROIHeads, build_backbone, build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import BRN2d, CenConv2d, GhostBatchNorm2d, MABN2d, MBN2d, Norm2d
from mabn_d2.plugin import norm_options
from mabn_d2.surgery import set_norm_batch_size

from .helpers.models import small_cfg, train_step
from .helpers.norms import DTYPES, FORMATS, as_layout, assert_same_state, state

# Past their warm-up and schedules after a few groups, and with bounds that are met at times.
NORMS = {
    "BN": lambda c, **options: nn.BatchNorm2d(c, momentum=0.3, **options),
    "MABN": lambda c, **options: MABN2d(
        c,
        momentum=0.3,
        buffer_size=3,
        warmup_iters=4,
        renorm_clip=1.2,
        renorm_start_iter=6,
        **options,
    ),
    "BRN": lambda c, **options: BRN2d(
        c, momentum=0.3, r_max=1.5, r_max_iters=(3, 9), d_max=0.5, d_max_iters=(2, 7), **options
    ),
    "MBN": lambda c, **options: MBN2d(c, memory_size=3, current_weight=0.6, decay=0.7, **options),
}
norms = pytest.mark.parametrize("name", NORMS)


def make(name, channels=3, dtype=torch.float64, **options):
    norm = NORMS[name](channels, **options).to(dtype)
    if norm.affine:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    return norm


def grouped(norm, size):
    """A copy that sees groups."""
    model = nn.Sequential(copy.deepcopy(norm))
    set_norm_batch_size(model, size)
    return model[0]


def train(norm, x, d):
    """Output, input's gradient and parameters' gradients of one forward and backward."""
    return train_in_turn(norm, x, d, len(x))


def train_in_turn(norm, x, d, size):
    """:func:`train`, group by group."""
    norm.zero_grad()
    groups = [group.detach().requires_grad_() for group in x.split(size)]
    outputs = [norm(group) for group in groups]
    for output, group in zip(outputs, d.split(size)):
        output.backward(group)
    return [torch.cat(outputs).detach(), torch.cat([group.grad for group in groups]),
            *(p.grad for p in norm.parameters())]  # fmt: skip


def random_batch(step, images=6, channels=3, area=(4, 5), dtype=torch.float64):
    """Input and output's gradient whose statistics differ from group to group and over time."""
    x, d = torch.randn(2, images, channels, *area, dtype=torch.float64)
    scale = 0.5 + 2 * torch.rand(images, 1, 1, 1, dtype=torch.float64)
    return (x * scale + 0.3 * step + torch.randn(images, 1, 1, 1)).to(dtype), d.to(dtype)


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@norms
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 100])
def test_output_gradients_and_state_are_those_of_the_groups_in_turn(name, size, dtype, tolerance):
    twin = make(name, dtype=dtype)
    norm = grouped(twin, size)
    for step in range(10):
        x, d = random_batch(step, images=5 if step == 7 else 6, dtype=dtype)
        assert_close(train(norm, x, d), train_in_turn(twin, x, d, size), tolerance)
        assert norm.state_dict().keys() == twin.state_dict().keys()
        assert_close(norm.state_dict().values(), twin.state_dict().values(), tolerance)
    x, _ = random_batch(0, dtype=dtype)
    torch.testing.assert_close(norm.eval()(x), twin.eval()(x), rtol=tolerance, atol=tolerance)


@norms
def test_a_group_is_seen_differently_from_the_whole_batch(name):
    whole = make(name)
    norm = grouped(whole, 2)
    x, d = random_batch(0)
    y, grad_x, grad_weight, grad_bias = train(norm, x, d)
    for a, b in zip(train(whole, x, d), (y, grad_x, grad_weight)):
        assert (a - b).abs().max() > 1e-2


@norms
def test_without_affine_the_groups_are_normalized_alike(name):
    twin = make(name, affine=False)
    norm = grouped(twin, 4)
    for step in range(6):
        x, d = random_batch(step)
        assert_close(train(norm, x, d), train_in_turn(twin, x, d, 4), 1e-10)
        assert_close(norm.state_dict().values(), twin.state_dict().values(), 1e-10)


@norms
@pytest.mark.parametrize("layout", FORMATS)
def test_output_and_gradient_have_the_inputs_memory_format(name, layout):
    norm, (x, d) = grouped(make(name), 2), random_batch(0)
    for d in (as_layout(d, "contiguous"), as_layout(d, "channels_last")):
        y, grad_x, *_ = train(norm, as_layout(x, layout), d)
        assert y.is_contiguous(memory_format=FORMATS[layout])
        assert grad_x.is_contiguous(memory_format=FORMATS[layout])


@settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    name=st.sampled_from(list(NORMS)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    size=st.integers(1, 8),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    affine=st.booleans(),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_any_input_gives_what_the_groups_in_turn_give_in_float64(
    name, shape, size, dtype, layout, affine, steps, seed
):
    images, channels, *area = shape
    if name == "BN" and area[0] * area[1] == 1:
        area[0] = 2  # PyTorch's BN refuses a group of one value
    torch.manual_seed(seed)
    twin = make(name, channels, affine=affine)
    norm = grouped(twin, size).to(torch.float64 if dtype == torch.float64 else torch.float32)
    twin.load_state_dict(norm.state_dict())  # the rounding of the parameters is no error
    lowest, tolerance = 1.0, DTYPES[dtype]
    for step in range(steps):
        x, d = random_batch(step, images, channels, area, dtype)
        y, grad_x, *grads = train(norm, as_layout(x, layout), as_layout(d, layout))
        assert y.dtype == grad_x.dtype == dtype
        x, d = x.double(), d.double()
        expected_y, expected_grad_x, *expected_grads = train_in_turn(twin, x, d, size)
        # The output is the difference of numbers of the size of |x|·scale; and so is the gradient.
        lowest = min(
            [lowest, *(g.var((0, 2, 3), correction=0).min().item() for g in x.split(size))]
        )
        scale = 3 / (lowest + twin.eps) ** 0.5  # of γ·r / σ
        size_x = scale * max(1.0, x.abs().max().item())
        size_d = scale * max(1.0, size_x)
        torch.testing.assert_close(y.double(), expected_y, rtol=0, atol=tolerance * size_x)
        torch.testing.assert_close(
            grad_x.double(), expected_grad_x, rtol=0, atol=tolerance * size_d
        )
        for a, b in zip(grads, expected_grads):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * size_x * d.numel())
        for key, value in twin.state_dict().items():
            # ψ alone is of what the output's type rounds.
            rounding = max(1e-5, tolerance * (key == "psi.values"))
            bound = (1e-10 if dtype == torch.float64 else rounding * size_x) * max(1, size_x)
            torch.testing.assert_close(
                norm.state_dict()[key].double(), value.double(), rtol=0, atol=bound
            )


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_groups_stay_float32_for_an_input_of_half_precision(name, dtype):
    exact = make(name)
    norm = grouped(exact, 2).float()
    exact.load_state_dict(norm.state_dict())
    norm.to(dtype)  # Norm2d's statistics stay in float32
    for parameters in zip(norm.parameters(), exact.parameters()):
        parameters[1].data.copy_(parameters[0])
    for step in range(10):
        x, d = random_batch(step, area=(8, 8), dtype=dtype)
        got = train(norm, x, d)
        want = train_in_turn(exact, x.double(), d.double(), 2)
        assert all(a.dtype == dtype for a in got)
        for a, b in zip(got, want):
            assert (a.double() - b).abs().max() <= 2 * DTYPES[dtype] * max(1.0, b.abs().max())
        for key, value in exact.state_dict().items():
            if key in ("weight", "bias"):
                continue
            kept = norm.state_dict()[key]
            if value.is_floating_point():
                assert kept.dtype == torch.float32
                # Those of the forward are exact but for float32; ψ is of the rounded gradients.
                bound = DTYPES[dtype] if key == "psi.values" else 1e-5
                assert (kept.double() - value).abs().max() <= bound * max(1.0, value.abs().max())
            else:
                assert torch.equal(kept, value)


def with_bad_group(x, value, where):
    x = x.clone()
    if where == "everywhere":
        x[2:4] = value
    else:
        x[3, 1, 2, 2] = value
    return x


@norms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_group_that_is_not_finite_leaves_no_trace_while_the_others_do(name, value):
    whole = make(name)
    norm, good_only = grouped(whole, 2), grouped(whole, 0)
    for step in range(8):
        x, d = random_batch(step)
        y, grad_x, *_ = train(norm, with_bad_group(x, value, "everywhere"), d)
        good = torch.cat([x[:2], x[4:]]), torch.cat([d[:2], d[4:]])
        train_in_turn(good_only, *good, 2)
        assert y[:2].isfinite().all() and y[4:].isfinite().all()
        assert grad_x[:2].isfinite().all() and grad_x[4:].isfinite().all()
        for key, expected in good_only.state_dict().items():
            # A BN counts all batches. MABN's running statistic moves on towards the moving average,
            # and ψ is of an output that was pulled towards it.
            if key != "num_batches_tracked" and (name, key) not in [
                ("MABN", "running_var"),
                ("MABN", "psi.values"),
            ]:
                torch.testing.assert_close(norm.state_dict()[key], expected, rtol=1e-10, atol=1e-10)


@norms
@pytest.mark.parametrize("where", ["everywhere", "in one channel"])
def test_groups_among_which_one_is_not_finite_are_still_those_in_turn(name, where):
    twin = grouped(make(name), 0)
    norm = grouped(twin, 2)
    for step in range(8):
        x, d = random_batch(step)
        if step in (0, 4, 5):
            x = with_bad_group(x, float("inf"), where)
        got, want = train(norm, x, d), train_in_turn(twin, x, d, 2)
        for a, b in zip(got[:2], want[:2]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert_close(norm.state_dict().values(), twin.state_dict().values(), 1e-9)
        assert all(v.isfinite().all() for v in norm.state_dict().values())


@norms
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing_each_group_is_recorded_once(name, use_reentrant):
    norm = grouped(make(name), 4)
    twin = copy.deepcopy(norm)
    for step in range(6):
        x, d = random_batch(step)
        y, grad_x, *grads = train(norm, x, d)
        twin.zero_grad()
        leaf = x.clone().requires_grad_()
        z = checkpoint(twin, leaf, use_reentrant=use_reentrant)
        z.backward(d)
        assert torch.equal(y, z) and torch.equal(grad_x, leaf.grad)
        assert all(torch.equal(a, p.grad) for a, p in zip(grads, twin.parameters()))
        assert_same_state(state(norm), state(twin))


@norms
@pytest.mark.parametrize("size", [0, 2])
def test_nothing_in_a_training_step_reads_a_value_back_from_the_device(name, size):
    # Fake tensors have no values: `.item()` or a branch on one raises.
    norm = grouped(make(name), size)
    with FakeTensorMode() as mode:
        tensors = [*norm.named_parameters(), *norm.named_buffers()]
        fake = {key: mode.from_tensor(value) for key, value in tensors}
        for images in (6, 5):
            x = torch.randn(images, 3, 4, 4, dtype=torch.float64, requires_grad=True)
            functional_call(norm, fake, (x,)).sum().backward()
            assert x.grad.shape == x.shape
            assert fake["weight"].grad.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            fake["running_var"].sum().item()


@norms
@pytest.mark.parametrize("layout", FORMATS)
def test_the_activation_behind_may_work_in_place(name, layout):
    # As Detectron2's ResNet does.
    twin = make(name)
    norm = grouped(twin, 4)
    x, d = random_batch(0)
    x, d = as_layout(x, layout), as_layout(d, layout)
    expected = train(nn.Sequential(twin, nn.ReLU()), x[:4], d[:4])
    got = train(nn.Sequential(norm, nn.ReLU(inplace=True)), x, d)
    assert_close([t[:4] for t in got[:2]], expected[:2], 1e-10)


@norms
def test_a_network_of_several_layers_sees_the_groups_in_turn(name):
    twin = nn.Sequential(CenConv2d(3, 4, 3, bias=False), make(name, 4), nn.ReLU(),
                         CenConv2d(4, 3, 3, bias=False), make(name, 3)).double()  # fmt: skip
    norm = copy.deepcopy(twin)
    set_norm_batch_size(norm, 2)
    for step in range(8):
        x, _ = random_batch(step, area=(9, 9))
        d = torch.randn(6, 3, 5, 5, dtype=torch.float64)
        assert_close(train(norm, x, d), train_in_turn(twin, x, d, 2), 1e-9)
        assert_close(norm.state_dict().values(), twin.state_dict().values(), 1e-9)


def mixed_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), MABN2d(4), nn.GroupNorm(2, 4),
        nn.Sequential(MBN2d(4), BRN2d(4), nn.LayerNorm(4), nn.InstanceNorm2d(4)),
    )  # fmt: skip


def test_the_state_dict_is_that_of_the_model_before():
    model = mixed_model()
    before = state(model)
    set_norm_batch_size(model, 2)
    assert_same_state(before, state(model))
    mixed_model().load_state_dict(model.state_dict())
    assert type(model[1]) is GhostBatchNorm2d and isinstance(model[1], nn.BatchNorm2d)
    assert model[1].weight is dict(model.named_parameters())["1.weight"]


def test_every_norm_with_batch_statistics_gets_the_size_and_others_are_left_alone():
    model = mixed_model()
    set_norm_batch_size(model, 2)
    sizes = {name: m.norm_batch_size for name, m in model.named_modules() if isinstance(m, Norm2d)}
    assert sizes == {"1": 2, "2": 2, "4.0": 2, "4.1": 2}
    kept = model[3], model[4][2], model[4][3]
    assert [type(m) for m in kept] == [nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d]
    assert not any(hasattr(m, "norm_batch_size") for m in kept)


@norms
def test_size_0_takes_it_back(name):
    twin = make(name)
    norm = grouped(grouped(twin, 2), 0)
    for step in range(8):
        x, d = random_batch(step)
        assert_close(train(norm, x, d), train(twin, x, d), 1e-12)
        assert_close(norm.state_dict().values(), twin.state_dict().values(), 1e-12)
    assert norm.norm_batch_size == 0


def test_a_bn_whose_parameters_are_frozen_goes_on_normalizing_with_its_batch():
    twin = make("BN").requires_grad_(False)
    norm = grouped(twin, 2)
    for step in range(3):
        x, _ = random_batch(step)
        expected = torch.cat([twin(group) for group in x.split(2)])
        torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)
        assert_close(norm.state_dict().values(), twin.state_dict().values(), 1e-10)


@norms
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (5, 3, 0, 4)])
def test_an_empty_input_leaves_no_trace(name, shape):
    norm = grouped(make(name), 2)
    before = state(norm)
    x = torch.empty(shape, dtype=torch.float64)
    y, grad_x, *grads = train(norm, x, x) if shape[0] else train_in_turn(norm, x, x, 1)
    assert y.shape == grad_x.shape == shape
    assert all(torch.equal(grad, torch.zeros(3, dtype=torch.float64)) for grad in grads)
    assert_same_state(before, state(norm))


def test_a_norm_over_several_workers_is_refused_with_its_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(4)))
    with pytest.raises(ValueError, match="^1.1 is a SyncBatchNorm"):
        set_norm_batch_size(model, 2)


@pytest.mark.parametrize("options", [dict(track_running_stats=False), dict(momentum=None)])
def test_a_bn_without_ordinary_running_statistics_is_refused_with_its_name(options):
    with pytest.raises(ValueError, match=r"^0: needs running statistics .* BatchNorm2d\(4"):
        set_norm_batch_size(nn.Sequential(nn.BatchNorm2d(4, **options)), 2)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="non-negative integer, got -1"):
        set_norm_batch_size(mixed_model(), -1)


@norms
def test_the_option_reaches_the_norms_whose_batches_are_images(name):
    model = build_model(small_cfg(name, "MODEL.NORM_BATCH_SIZE", 1))
    for part, size in [(model.backbone, 1), (model.roi_heads, 0)]:
        found = [m for m in part.modules() if isinstance(m, (Norm2d, nn.BatchNorm2d))]
        assert len(found) > 3
        assert {getattr(m, "norm_batch_size", 0) for m in found} == {size}
    # Lateral and output convolutions of the FPN as well as the stages.
    assert model.backbone.fpn_lateral2.norm.norm_batch_size == 1
    assert model.backbone.bottom_up.stem.conv1.norm.norm_batch_size == 1


@norms
@pytest.mark.parametrize("size", [1, 2])
def test_a_detectron2_model_trains_with_the_option(name, size):
    model = build_model(small_cfg(name, "MODEL.NORM_BATCH_SIZE", size))
    losses = train_step(model)  # two images
    assert all(loss.isfinite() for loss in losses.values())
    norm = model.backbone.bottom_up.stem.conv1.norm
    counts = norm.second_moment.count if name == "MABN" else norm.num_batches_tracked
    assert counts == 2 // size
    assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("builds", [build_backbone, build_model])
def test_without_the_option_a_norm_sees_all_images(builds):
    for name in NORMS:
        model = builds(small_cfg(name))
        assert not any(getattr(m, "norm_batch_size", 0) for m in model.modules())
        if name == "BN":
            assert not any(isinstance(m, Norm2d) for m in model.modules())


def test_a_backbone_that_is_built_alone_gets_the_option():
    backbone = build_backbone(small_cfg("BN", "MODEL.NORM_BATCH_SIZE", 2))
    found = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert found and {m.norm_batch_size for m in found} == {2}
    assert not any(isinstance(m, ROIHeads) for m in backbone.modules())


@pytest.mark.parametrize("use", [norm_options, build_model, build_backbone])
def test_a_negative_option_is_refused_by_its_key(use):
    with pytest.raises(ValueError, match="MODEL.NORM_BATCH_SIZE must be .* got -1"):
        use(small_cfg("BN", "MODEL.NORM_BATCH_SIZE", -1))
