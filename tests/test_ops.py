"""The operations under the norms, and the formulas that they have on CUDA alone."""

import pytest
import torch

from mabn_d2.ops import affine_map, affine_map_backward, record, record_one, second_moment_about
from mabn_d2.ops.per_channel import as_product

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def vectors(channels=6, dtype=torch.float32):
    return torch.randn(4, channels, dtype=dtype).unbind()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("layout_of_d", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_maps_are_their_formulas(layout, layout_of_d, shift, dtype):
    x, d = torch.randn(2, 3, 6, 4, 5).to(dtype)
    x, d = x.contiguous(memory_format=layout), d.contiguous(memory_format=layout_of_d)
    mean, scale, unit, slope = vectors(6, torch.promote_types(dtype, torch.float32))
    mean = mean * shift
    out = affine_map(x, mean, scale, unit)
    grad_x, sum_dz, sum_d = affine_map_backward(d, x, mean, scale, unit, lambda _: slope, True)
    x64, d64, (m, a, u, b) = (
        x.double(),
        d.double(),
        (v.double()[:, None, None] for v in (mean, scale, unit, slope)),
    )
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
    close = lambda actual, expected: torch.testing.assert_close(  # noqa: E731
        actual.double(), expected, rtol=bound, atol=bound * expected.abs().max().item()
    )
    close(out, a * (x64 - m) + u)
    close(grad_x, a * d64 - b * (x64 - m))
    close(sum_dz, (d64 * u * (x64 - m)).sum((0, 2, 3)))
    close(sum_d, d64.sum((0, 2, 3)))
    close(second_moment_about(x, mean), (x64 - m).square().mean((0, 2, 3)))
    assert out.dtype == grad_x.dtype == dtype
    assert out.is_contiguous(memory_format=layout)


def elemt(d, x, mean, factor, quotient):
    """What `batch_norm_backward_elemt` computes with these arguments; the CPU has no such operator."""
    x, d = x.to(factor.dtype), d.to(factor.dtype)
    mean, factor, quotient = (v[:, None, None] for v in (mean, factor, quotient))
    return (d - (x - mean) * quotient) * factor


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_that_cuda_computes_is_right_where_a_channel_is_off(loss_scale, dtype):
    scale = torch.tensor([0.0, 0.0, 1e-20, -1e-20, 1e-38, -1e-38, 1.0, -0.5, 3e-6, -1.0])
    slope = torch.tensor([0.3, 0.0, 0.3, -0.3, 0.2, 0.2, 0.3, 0.0, -0.7, 1e-12]) * loss_scale
    mean = torch.randn(len(scale))
    x = torch.randn(2, len(scale), 3, 3).to(dtype)
    d = (torch.randn(x.shape) * loss_scale * (1 if dtype == torch.float32 else 0.1)).to(dtype)
    actual = elemt(d, x, mean, *as_product(scale, slope)).double()
    a, b, m = (v.double()[:, None, None] for v in (scale, slope, mean))
    terms = a * d.double(), b * (x.double() - m)
    # To the rounding of the larger term, and of the difference x - mean.
    bound = 4e-7 * (terms[0].abs() + b.abs() * (x.double().abs() + m.abs()))
    assert ((actual - (terms[0] - terms[1])).abs() <= bound).all()
    assert (actual[:, 1] == 0).all()  # both vectors are 0 there


def test_a_product_whose_factors_would_cancel_stays_finite():
    slope = torch.tensor([1.0, -3.7])
    factor, quotient = as_product(-(slope * 1e-20), slope)
    assert factor.isfinite().all() and quotient.isfinite().all()


def test_recording_one_statistic_is_recording_a_list_of_one():
    one, many = torch.zeros(3, 4), torch.zeros(3, 4)
    count, count_of_many = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    for step in range(12):
        statistic = torch.randn(1, 4)
        if step % 4 == 2:
            statistic[0, step % 3] = [float("nan"), float("inf"), -float("inf")][step % 3]
        before = count.item()
        is_early, finite = record_one(statistic, one, count, 4)
        recorded = record(statistic, many, count_of_many)
        assert torch.equal(one, many) and torch.equal(count, count_of_many)
        assert finite == recorded.finite[0] == (step % 4 != 2)
        assert is_early == (finite and before < 4)


def test_the_place_in_the_buffer_is_exact_after_any_number_of_batches():
    values, count = torch.zeros(7, 2), torch.tensor(2**40 + 5)
    record_one(torch.ones(1, 2), values, count)
    assert values[(2**40 + 5) % 7].tolist() == [1, 1] and values.sum() == 2
    assert count == 2**40 + 6
