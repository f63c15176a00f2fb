"""
The operations on vectors of C values in a MABN call, for one batch: a Triton kernel in place of some ten launches.

Each function has the signature of its counterpart in `moving_average.py` or `per_channel.py` and returns the same
numbers; those named `_vectors` take sums in parts, shape (P, C), and tell where `triton_passes.py` was too early. A
kernel is one program that goes through the channels block by block: whether a statistic is finite and which number it
has concerns all channels, and nothing is read that another program may have changed.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # channels at a time
ROWS = 16  # of the ring buffer, or parts of a sum, at a time


@triton.jit
def _total(sums, parts, c, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The sums of a block of channels from their parts."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (c < C)[None, :]
        total += tl.load(sums + row[:, None] * C + c[None, :], mask, 0.0)
    return tl.sum(total, 0)


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


@triton.jit(do_not_specialize=["parts"])
def _forward_kernel(
    sums, parts, share, values, count_pointer, running_var, weight, differs, unit, scale, squared,
    warmup_iters, renorm_start_iter, least_ratio, most_ratio, momentum, eps,
    HAS_WEIGHT: tl.constexpr, RENORMALIZES: tl.constexpr, LAG: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_pointer)
    bad = 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = _total(sums, parts, c, C, BLOCK, ROWS) * share
        bad += tl.sum(tl.where(tl.abs(value) < float("inf"), 0, 1), 0)  # NaN is not below
    finite = bad == 0
    new_count = count + finite.to(tl.int64)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < C
        value = _total(sums, parts, c, C, BLOCK, ROWS) * share
        moving = _push_and_average(value, finite, values, count, warmup_iters, c, LAG, C, M, ROWS)
        running = tl.load(running_var + c, mask, 1.0)
        tl.store(running_var + c, running + momentum * (moving - running), mask)
        running += eps
        moving += eps
        ratio = tl.zeros_like(moving) + 1.0
        cancels = c < 0
        if RENORMALIZES:
            ratio = moving / running
            cancels = (ratio >= least_ratio) & (ratio <= most_ratio)
            ratio = tl.minimum(tl.maximum(ratio, least_ratio), most_ratio)
            is_started = new_count + tl.zeros_like(c) > renorm_start_iter
            cancels = cancels & is_started
            ratio = tl.where(is_started, ratio, 1.0)
        factor = tl.where(cancels, 1.0 / tl.sqrt(running), tl.sqrt(ratio / moving))
        tl.store(differs + c, tl.where(cancels, 0, 1), mask)
        tl.store(squared + c, moving, mask)
        tl.store(unit + c, factor, mask)
        if HAS_WEIGHT:
            tl.store(scale + c, factor * tl.load(weight + c, mask, 0.0), mask)
    tl.store(count_pointer, new_count)


@triton.jit
def _psi(
    sum_dz, weight, share, loss_scale, c, mask, HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr
):
    psi = sum_dz
    if HAS_WEIGHT:
        psi *= tl.load(weight + c, mask, 0.0)
    psi *= share
    if HAS_SCALE:
        psi /= tl.load(loss_scale)
    return psi


@triton.jit(do_not_specialize=["parts"])
def _backward_kernel(
    sums_dz, sums_d, parts, squared, weight, loss_scale, values, count_pointer, differs, slope,
    sum_dz, sum_d, share, warmup_iters, HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr,
    LAG: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_pointer)
    bad = 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total = _total(sums_dz, parts, c, C, BLOCK, ROWS)
        psi = _psi(total, weight, share, loss_scale, c, c < C, HAS_WEIGHT, HAS_SCALE)
        bad += tl.sum(tl.where(tl.abs(psi) < float("inf"), 0, 1), 0)
    finite = bad == 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < C
        total = _total(sums_dz, parts, c, C, BLOCK, ROWS)
        psi = _psi(total, weight, share, loss_scale, c, mask, HAS_WEIGHT, HAS_SCALE)
        psi = _push_and_average(psi, finite, values, count, warmup_iters, c, LAG, C, M, ROWS)
        if HAS_SCALE:
            psi *= tl.load(loss_scale)
        tl.store(slope + c, psi / tl.load(squared + c, mask, 1.0), mask)
        if LAG:
            tl.store(differs + c, tl.where(count + tl.zeros_like(c) < warmup_iters, 1, 0), mask)
            tl.store(sum_dz + c, total, mask)
            tl.store(sum_d + c, _total(sums_d, parts, c, C, BLOCK, ROWS), mask)
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


def forward_vectors(
    sums, share, values, count, running_var, weight, warmup_iters, renorm_start_iter, renorm_clip,
    momentum, eps, lag,
):  # fmt: skip
    """
    `mabn_forward_factors` for χ²_B = share·Σ of `sums`, shape (P, C).

    Returns:
        where the unit is not 1 / sqrt(χ̂² + ε), int8 of shape (C,); then what `mabn_forward_factors` returns.
    """
    unit, scale, squared = (sums.new_empty(1, sums.shape[1]) for _ in range(3))
    differs = torch.empty(sums.shape[1], dtype=torch.int8, device=sums.device)
    _forward_kernel[(1,)](
        sums, len(sums), share, values, count, running_var, sums if weight is None else weight,
        differs, unit, scale, squared, warmup_iters, renorm_start_iter or 0, renorm_clip**-2,
        renorm_clip**2, momentum, eps, HAS_WEIGHT=weight is not None,
        RENORMALIZES=renorm_start_iter is not None, LAG=lag, C=values.shape[1], M=values.shape[0],
        BLOCK=BLOCK, ROWS=ROWS,
    )  # fmt: skip
    return differs, unit, unit if weight is None else scale, squared


def backward_vectors(
    sums_dz, sums_d, num_values, squared, weight, loss_scale, values, count, warmup_iters, lag
):
    """
    `mabn_backward_slope` for the sum of `sums_dz`, shape (P, C).

    Returns:
        whether ψ̄ is not that of the ring buffer before, int8 of shape (C,); what `mabn_backward_slope` returns; the
        sums of `sums_dz` and `sums_d`, shape (C,). All but the slope are set with a lag only.
    """
    slope, sum_dz, sum_d = (torch.empty_like(sums_dz[:1]) for _ in range(3))
    differs = torch.empty(sums_dz.shape[1], dtype=torch.int8, device=sums_dz.device)
    _backward_kernel[(1,)](
        sums_dz, sums_d, len(sums_dz), squared, sums_dz if weight is None else weight,
        sums_dz if loss_scale is None else loss_scale, values, count, differs, slope, sum_dz,
        sum_d, 1.0 / num_values, warmup_iters, HAS_WEIGHT=weight is not None,
        HAS_SCALE=loss_scale is not None, LAG=lag, C=values.shape[1], M=values.shape[0],
        BLOCK=BLOCK, ROWS=ROWS,
    )  # fmt: skip
    return differs, slope, sum_dz[0], sum_d[0]


def mabn_forward_factors(second_moment, *others, **options):
    return forward_vectors(second_moment, 1.0, *others, **options)[1:]


def mabn_backward_slope(sum_dz, *others):
    return backward_vectors(sum_dz, sum_dz, *others)[1]


def as_product(scale, slope):
    factor, quotient = torch.empty_like(scale), torch.empty_like(scale)
    blocks = (triton.cdiv(len(scale), BLOCK),)
    _product_kernel[blocks](scale, slope, factor, quotient, C=len(scale), BLOCK=BLOCK)
    return factor, quotient
