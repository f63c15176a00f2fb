"""
What passes over a whole tensor in a MABN call, for one batch: Triton kernels that write before all is known.

The factors of a batch are, as a rule, known before it is read: r cancels χ̄² unless it is clipped, and with a lag ψ̄ is
that of the batches before. So the first kernel reads the tensor once, writes the result and gathers the sums; the
kernel for vectors finds the true factors; the last one rewrites the channels whose factor differs, most often none.

A tile is VALUES × CHANNELS large. The values of a channel are counted over N, H and W. Each program goes through the
tiles of its part, and writes its sums to a row of its own: their order never changes.
"""

import torch
import triton
import triton.language as tl

from .modes import constant
from .per_channel import in_format_of
from .triton_vectors import backward_vectors, forward_vectors

TILES = {True: (64, 32), False: (2048, 1)}  # VALUES, CHANNELS: channels_last, NCHW
PROGRAMS = 1024  # about as many keep a GPU busy
ROWS = 16  # of the ring buffer at a time
SIZES = ["num_values", "steps", "area"]  # images come in many sizes: one kernel for all


@triton.jit
def _channels(C, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return c, c < C


@triton.jit
def _tile(
    step, c, steps, num_values, area, C, CHANNELS_LAST: tl.constexpr, VALUES: tl.constexpr
):  # fmt: skip
    """Places of a program's tile, and which of them exist."""
    value = (tl.program_id(1) * steps + step) * VALUES + tl.arange(0, VALUES)
    mask = (value < num_values)[:, None] & (c < C)[None, :]
    if CHANNELS_LAST:
        place = value.to(tl.int64)[:, None] * C + c[None, :]
    else:
        image = value // area
        plane = image.to(tl.int64)[:, None] * C + c[None, :]
        place = plane * area + (value - image * area)[:, None]
    return place, mask


@triton.jit(do_not_specialize=SIZES)
def _forward_pass(
    x, out, sums, shift, bias, weight, running_var, count_pointer, renorm_start_iter, eps,
    num_values, steps, area, C, CHANNELS_LAST: tl.constexpr, VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = γ·(x - s) / sqrt(χ̂² + ε) + β where r has started, and Σ (x - s)²."""
    c, exists = _channels(C, CHANNELS)
    s = tl.load(shift + c, exists, 0.0)[None, :]
    constant = tl.load(bias + c, exists, 0.0)[None, :]
    unit = 1.0 / tl.sqrt(tl.load(running_var + c, exists, 1.0) + eps)
    scale = unit * tl.load(weight + c, exists, 0.0)
    is_known = tl.load(count_pointer) + tl.zeros_like(c) >= renorm_start_iter
    total = tl.zeros((VALUES, CHANNELS), tl.float32)
    for step in range(steps):
        place, mask = _tile(step, c, steps, num_values, area, C, CHANNELS_LAST, VALUES)
        centered = tl.where(mask, tl.load(x + place, mask, 0.0).to(tl.float32) - s, 0.0)
        total += centered * centered
        tl.store(out + place, scale[None, :] * centered + constant, mask & is_known[None, :])
    tl.store(sums + tl.program_id(1) * C + c, tl.sum(total, 0), exists)


@triton.jit(do_not_specialize=SIZES)
def _backward_pass(
    d, x, grad_x, sums_dz, sums_d, shift, unit, scale, squared, loss_scale, ring, count_pointer,
    warmup_iters, M, num_values, steps, area, C, HAS_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = scale·d - ψ̄ / (χ̄² + ε)·(x - s) with ψ̄ of the ring buffer past warm-up, Σ d·z and Σ d."""
    c, exists = _channels(C, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, M, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & exists[None, :]
        total += tl.load(ring + row[:, None] * C + c[None, :], mask, 0.0)
    psi = tl.sum(total, 0) / M
    if HAS_SCALE:
        psi *= tl.load(loss_scale)
    slope = psi / tl.load(squared + c, exists, 1.0)
    s = tl.load(shift + c, exists, 0.0)[None, :]
    factor = tl.load(scale + c, exists, 0.0)[None, :]
    is_known = tl.load(count_pointer) + tl.zeros_like(c) >= warmup_iters
    sum_dx = tl.zeros((VALUES, CHANNELS), tl.float32)
    sum_d = tl.zeros((VALUES, CHANNELS), tl.float32)
    for step in range(steps):
        place, mask = _tile(step, c, steps, num_values, area, C, CHANNELS_LAST, VALUES)
        centered = tl.where(mask, tl.load(x + place, mask, 0.0).to(tl.float32) - s, 0.0)
        gradient = tl.load(d + place, mask, 0.0).to(tl.float32)
        sum_dx += gradient * centered
        sum_d += gradient
        tl.store(
            grad_x + place, factor * gradient - slope[None, :] * centered, mask & is_known[None, :]
        )  # fmt: skip
    sum_dz = tl.sum(sum_dx, 0) * tl.load(unit + c, exists, 0.0)
    tl.store(sums_dz + tl.program_id(1) * C + c, sum_dz, exists)
    tl.store(sums_d + tl.program_id(1) * C + c, tl.sum(sum_d, 0), exists)


@triton.jit(do_not_specialize=SIZES)
def _rewrite(
    x, d, out, differs, shift, factor, other, num_values, steps, area, C, IS_BACKWARD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """factor·(x - s) + other, or backward other·d - factor·(x - s), in the channels that differ."""
    c, exists = _channels(C, CHANNELS)
    is_wrong = tl.load(differs + c, exists, 0)
    if tl.max(is_wrong, 0) > 0:
        s = tl.load(shift + c, exists, 0.0)[None, :]
        a = tl.load(factor + c, exists, 0.0)[None, :]
        b = tl.load(other + c, exists, 0.0)[None, :]
        for step in range(steps):
            place, mask = _tile(step, c, steps, num_values, area, C, CHANNELS_LAST, VALUES)
            mask = mask & (is_wrong > 0)[None, :]
            result = a * (tl.load(x + place, mask, 0.0).to(tl.float32) - s)
            if IS_BACKWARD:
                result = b * tl.load(d + place, mask, 0.0).to(tl.float32) - result
            else:
                result = result + b
            tl.store(out + place, result, mask)


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels can go over this tensor, shape (N, C, H, W): it has no gaps."""
    dtypes = [torch.float32, torch.float16]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0):
        dtypes.append(torch.bfloat16)  # earlier GPUs have no instructions for it
    return (
        x.dtype in dtypes
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        and x.numel() // x.shape[1] < 2**30  # values of a channel are counted in int32
    )


def _division(x: torch.Tensor) -> tuple[tuple[int, int], dict]:
    """The grid, shape (blocks of channels, parts), and the arguments that say which tiles a program has."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    tile_values, tile_channels = TILES[is_last]
    num_values, blocks = x.numel() // channels, triton.cdiv(channels, tile_channels)
    tiles = triton.cdiv(num_values, tile_values)
    steps = triton.cdiv(tiles, max(PROGRAMS // blocks, 1))
    return (blocks, triton.cdiv(tiles, steps)), dict(
        num_values=num_values, steps=steps, area=area, C=channels, CHANNELS_LAST=is_last,
        VALUES=tile_values, CHANNELS=tile_channels,
    )  # fmt: skip


def mabn_forward(
    x, shift, bias, values, count, running_var, weight, warmup_iters, renorm_start_iter,
    renorm_clip, momentum, eps, lag=0,
):  # fmt: skip
    """
    MABN's output, and what `mabn_forward_factors` returns. Reads x once and writes once, in the common case.

    Args:
        x: shape (N, C, H, W), which :func:`takes` admits.
        shift: s, shape (C,).
        bias: β, shape (C,), or None as `weight`.
        values, ...: those of `mabn_forward_factors`.
    """
    grid, tiles = _division(x)
    like = dict(dtype=running_var.dtype, device=x.device)
    offset = constant(torch.zeros, x.shape[1], **like) if bias is None else bias
    factor = constant(torch.ones, x.shape[1], **like) if weight is None else weight
    out, sums = torch.empty_like(x), torch.empty(grid[1], x.shape[1], **like)
    _forward_pass[grid](
        x, out, sums, shift, offset, factor, running_var, count, renorm_start_iter, eps, **tiles
    )  # fmt: skip
    differs, *factors = forward_vectors(
        sums, 1.0 / tiles["num_values"], values, count, running_var, weight, warmup_iters,
        renorm_start_iter, renorm_clip, momentum, eps, lag,
    )  # fmt: skip
    _rewrite[grid](x, x, out, differs, shift, factors[1], offset, IS_BACKWARD=False, **tiles)
    return out, factors


def mabn_backward(
    d, x, shift, unit, scale, squared, weight, loss_scale, values, count, warmup_iters, lag
):
    """
    The gradient of MABN's input with a lag of 1. Reads d and x once and writes once, past warm-up.

    Args:
        d, x: shape (N, C, H, W), x as :func:`takes` admits.
        shift, unit, scale, squared: s and `ForwardFactors`.
        weight, ...: those of `mabn_backward_slope`.

    Returns:
        it in the memory format of x, Σ d·z and Σ d, the latter of shape (C,).
    """
    d = in_format_of(x, d)
    grid, tiles = _division(x)
    grad_x = torch.empty_like(x)
    sums_dz, sums_d = (
        torch.empty(grid[1], x.shape[1], dtype=scale.dtype, device=x.device) for _ in range(2)
    )
    _backward_pass[grid](
        d, x, grad_x, sums_dz, sums_d, shift, unit, scale, squared,
        squared if loss_scale is None else loss_scale, values, count, warmup_iters,
        len(values), HAS_SCALE=loss_scale is not None, ROWS=ROWS, **tiles,
    )  # fmt: skip
    differs, slope, sum_dz, sum_d = backward_vectors(
        sums_dz, sums_d, tiles["num_values"], squared, weight, loss_scale, values, count,
        warmup_iters, lag,
    )  # fmt: skip
    _rewrite[grid](x, d, grad_x, differs, shift, slope, scale, IS_BACKWARD=True, **tiles)
    return grad_x, sum_dz, sum_d
