"""
The operations on vectors of C values in a MABN call, for one batch: a Triton kernel in place of some ten launches.

Each function has the signature of its counterpart in `moving_average.py` or `per_channel.py` and returns the same
numbers. A kernel is one program that goes through the channels block by block: whether a statistic is finite and
which number it has concerns all channels, and nothing is read that another program may have changed.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # channels at a time
ROWS = 16  # of the ring buffer at a time


@triton.jit
def _push_and_average(
    statistic, finite, values, count, warmup_iters, c, LAG: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`record_and_average` for a block of channels; `count` is that before the statistic."""
    slot = count % M
    total = tl.zeros_like(statistic)
    for first in range(0, M, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row[:, None] < M) & (c[None, :] < C)
        is_new = (row[:, None] == slot) & finite & mask
        place = values + row[:, None] * C + c[None, :]
        before = tl.load(place, mask, 0.0)
        after = tl.where(is_new, statistic[None, :], before)
        tl.store(place, after, is_new)
        total += tl.sum(before if LAG else after, 0)
    return tl.where(finite & (count < warmup_iters), statistic, total / M)


@triton.jit
def _forward_kernel(
    second_moment, values, count_pointer, running_var, weight, unit, scale, squared, warmup_iters,
    renorm_start_iter, least_ratio, most_ratio, momentum, eps, HAS_WEIGHT: tl.constexpr,
    RENORMALIZES: tl.constexpr, LAG: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_pointer)
    bad = 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(second_moment + c, c < C, 0.0)
        bad += tl.sum(tl.where(tl.abs(value) < float("inf"), 0, 1), 0)  # NaN is not below
    finite = bad == 0
    new_count = count + finite.to(tl.int64)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < C
        value = tl.load(second_moment + c, mask, 0.0)
        moving = _push_and_average(value, finite, values, count, warmup_iters, c, LAG, C, M, ROWS)
        running = tl.load(running_var + c, mask, 1.0)
        tl.store(running_var + c, running + momentum * (moving - running), mask)
        moving += eps
        ratio = tl.zeros_like(moving) + 1.0
        if RENORMALIZES:
            ratio = tl.where(new_count > renorm_start_iter, moving / (running + eps), 1.0)
            ratio = tl.minimum(tl.maximum(ratio, least_ratio), most_ratio)
        factor = tl.sqrt(ratio / moving)
        tl.store(squared + c, moving, mask)
        tl.store(unit + c, factor, mask)
        if HAS_WEIGHT:
            tl.store(scale + c, factor * tl.load(weight + c, mask, 0.0), mask)
    tl.store(count_pointer, new_count)


@triton.jit
def _psi(
    sum_dz, weight, share, loss_scale, c, mask, HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr
):
    psi = tl.load(sum_dz + c, mask, 0.0)
    if HAS_WEIGHT:
        psi *= tl.load(weight + c, mask, 0.0)
    psi *= share
    if HAS_SCALE:
        psi /= tl.load(loss_scale)
    return psi


@triton.jit
def _backward_kernel(
    sum_dz, squared, weight, loss_scale, values, count_pointer, slope, share, warmup_iters,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, LAG: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_pointer)
    bad = 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        psi = _psi(sum_dz, weight, share, loss_scale, c, c < C, HAS_WEIGHT, HAS_SCALE)
        bad += tl.sum(tl.where(tl.abs(psi) < float("inf"), 0, 1), 0)
    finite = bad == 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < C
        psi = _psi(sum_dz, weight, share, loss_scale, c, mask, HAS_WEIGHT, HAS_SCALE)
        psi = _push_and_average(psi, finite, values, count, warmup_iters, c, LAG, C, M, ROWS)
        if HAS_SCALE:
            psi *= tl.load(loss_scale)
        tl.store(slope + c, psi / tl.load(squared + c, mask, 1.0), mask)
    tl.store(count_pointer, count + finite.to(tl.int64))


@triton.jit
def _product_kernel(scale, slope, factor, quotient, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    subtrahend = tl.load(slope + c, mask, 0.0)
    divisor = tl.load(scale + c, mask, 1.0) + 1e-20 * subtrahend
    value = subtrahend / divisor
    tl.store(factor + c, divisor, mask)
    tl.store(quotient + c, tl.where(tl.abs(value) < float("inf"), value, 0.0), mask)


def mabn_forward_factors(
    second_moment, values, count, running_var, weight, warmup_iters, renorm_start_iter,
    renorm_clip, momentum, eps, lag=0,
):  # fmt: skip
    unit, scale, squared = (torch.empty_like(second_moment) for _ in range(3))
    _forward_kernel[(1,)](
        second_moment, values, count, running_var, second_moment if weight is None else weight,
        unit, scale, squared, warmup_iters, renorm_start_iter or 0, renorm_clip**-2, renorm_clip**2,
        momentum, eps, HAS_WEIGHT=weight is not None, RENORMALIZES=renorm_start_iter is not None,
        LAG=lag, C=values.shape[1], M=values.shape[0], BLOCK=BLOCK, ROWS=ROWS,
    )  # fmt: skip
    return unit, unit if weight is None else scale, squared


def mabn_backward_slope(
    sum_dz, num_values, squared, weight, loss_scale, values, count, warmup_iters, lag=0
):
    slope = torch.empty_like(sum_dz)
    _backward_kernel[(1,)](
        sum_dz, squared, sum_dz if weight is None else weight,
        sum_dz if loss_scale is None else loss_scale, values, count, slope, 1.0 / num_values,
        warmup_iters, HAS_WEIGHT=weight is not None, HAS_SCALE=loss_scale is not None,
        LAG=lag, C=values.shape[1], M=values.shape[0], BLOCK=BLOCK, ROWS=ROWS,
    )  # fmt: skip
    return slope


def as_product(scale, slope):
    factor, quotient = torch.empty_like(scale), torch.empty_like(scale)
    blocks = (triton.cdiv(len(scale), BLOCK),)
    _product_kernel[blocks](scale, slope, factor, quotient, C=len(scale), BLOCK=BLOCK)
    return factor, quotient
