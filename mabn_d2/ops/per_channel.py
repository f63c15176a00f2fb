"""
Reductions and maps per channel: what passes over a whole tensor.

On the CPU they are PyTorch's fused batch norm, on CUDA the parts that `nn.SyncBatchNorm` is made of. Vectors have
one value per channel, shape (C,), at least float32, and are what the results are computed in.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .modes import constant, is_eager, triton_for


def second_moment_about(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """
    mean((x - shift)²) over all but the channel dimension. Reads x once.

    Args:
        x: shape (N, C, H, W), not empty.
        shift: shape (C,).

    Returns:
        tensor of shape (C,), type of `shift`.
    """
    if x.is_cuda:
        mean, var = channel_mean_var(x, shift.dtype)
        deviation = mean - shift
        return torch.addcmul(var, deviation, deviation)
    # BN's backward contains the reductions Σ x·(x - shift) and Σ x, fused and without a temporary.
    _, dot, total = _backward_of_map(x, x, torch.ones_like(shift), shift, [False, True, True])
    count = x.numel() // x.shape[1]
    return ((dot - shift * total) / count + shift.square()).clamp(min=0)


def channel_mean_var(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and biased variance over all but the channel dimension, in BN's own reduction.

    Args:
        x: shape (N, C, H, W).

    Returns:
        two tensors of shape (C,), type `dtype`.
    """
    if torch.compiler.is_compiling():  # it knows no form of that reduction, and fuses this one
        var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
        return mean, var
    if x.is_cuda:
        mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        return mean.to(dtype), var.to(dtype)
    # The operator computes in the type of the running statistics that it is given.
    unused = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    return torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)


def affine_map(
    x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """scale·(x - mean) + bias in the dtype and memory format of x; vectors of shape (C,)."""
    if x.is_cuda:
        return torch.batch_norm_elemt(x, None, bias, mean, scale, 0.0)
    # BN's inference form. Variance and eps, which must be positive, add up to 1.
    return F.batch_norm(
        x, mean, torch.full_like(scale, 0.5), scale, bias, training=False, eps=0.5
    )  # fmt: skip


def affine_map_backward(
    d: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    unit: torch.Tensor,
    slope: Callable[[torch.Tensor], torch.Tensor],
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """
    The backward pass of :func:`affine_map`, less a multiple of x that depends on the sums over d.

    Args:
        d: gradient of the map's output.
        mean, scale: those of the map, shape (C,).
        unit: shape (C,); the map is one of z = unit·(x - mean).
        slope: gives the multiple, shape (C,), for Σ d·z. Called if the gradient of x is needed.
        needs_x: whether it is.

    Returns:
        scale·d - slope·(x - mean) in the memory format of x, or None; Σ d·z and Σ d, shape (C,).
    """
    if not x.is_cuda:
        grad_x, dot, sum_d = _backward_of_map(d, x, scale, mean, [needs_x, True, True])
        sum_dz = dot * unit
        if needs_x:
            subtrahend = slope(sum_dz)
            add_affine_(
                grad_x, x, -subtrahend, subtrahend * mean if _may_differ_from_0(mean) else None
            )
        return grad_x, sum_dz, sum_d
    d = in_format_of(x, d)
    _, _, sum_dz, sum_d = torch.batch_norm_backward_reduce(
        d, x, mean, unit, unit, False, True, True
    )
    grad_x = None
    if needs_x:
        factor, quotient = as_product(scale, slope(sum_dz))
        like = dict(dtype=scale.dtype, device=scale.device)
        zeros = constant(torch.zeros, len(scale), **like)
        ones = constant(torch.ones, len(scale), **like)
        one = constant(torch.ones, 1, dtype=torch.int32, device=scale.device)
        grad_x = torch.batch_norm_backward_elemt(d, x, mean, ones, factor, zeros, quotient, one)
    return grad_x, sum_dz, sum_d


def gradient_sums(
    d: torch.Tensor, x: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ d·(x - mean) and Σ d per channel, in one pass and without a temporary; vectors of shape (C,)."""
    needs = [False, True, True]
    _, dot, sum_d = _backward_of_map(d.to(x.dtype), x, torch.ones_like(mean), mean, needs)
    return dot, sum_d


def normalization_backward(
    d: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inv_std: torch.Tensor,
    scale: torch.Tensor,
    share: torch.Tensor | None,
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """
    The backward pass of scale·z + bias with z = inv_std·(x - mean), where a share of the statistics is x's own.

    Args:
        d: gradient of the output.
        mean, inv_std, scale: shape (C,).
        share: one value in [0, 1]; None is 1, which is BN.
        needs_x: whether the gradient of x is needed.

    Returns:
        scale·inv_std·(d - share·mean(d) - share·z·mean(d·z)) in the memory format of x, or None;
        Σ d·z and Σ d, shape (C,).
    """
    if x.is_cuda:
        d = in_format_of(x, d)
    if x.is_cuda and share is not None and needs_x:
        sum_d, sum_dx, sum_dz, _ = torch.batch_norm_backward_reduce(
            d, x, mean, inv_std, scale, True, True, False
        )
        share = share / (x.numel() // len(mean))
        one = constant(torch.ones, 1, dtype=torch.int32, device=x.device)
        grad_x = torch.batch_norm_backward_elemt(
            d, x, mean, inv_std, scale, share * sum_d, share * sum_dx, one
        )
        return grad_x, sum_dz, sum_d
    grad_x, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
        d, x, scale if share is None else scale * share, None, None, mean, inv_std, True, 0.0,
        [needs_x, True, True],
    )  # fmt: skip
    if needs_x and share is not None:
        add_affine_(grad_x, d, scale * (1 - share) * inv_std)
    return grad_x, sum_dz, sum_d


def as_product(scale: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factors of scale·d - slope·x = factor·(d - quotient·x), which is what CUDA has a kernel for.

    Where a channel is off, `scale` is 0 while `slope` need not be. The factor then is 1e-20·slope: x's term is
    right, d's is wrong by 1e-20 of it, far below the rounding. Where both are 0, both results are.
    """
    kernels = triton_for(scale)
    if kernels is not None:
        return kernels.as_product(scale, slope)
    factor = torch.add(scale, slope, alpha=1e-20)
    return factor, (slope / factor).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def add_affine_(
    total: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """
    total + scale·x + shift per channel, in place.

    Args:
        total, x: shape (N, C, H, W), of one dtype.
        scale, shift: shape (C,), at least float32. The map is computed in this type.
    """
    # A CUDA kernel converts as it reads; but with a shift the sum would be rounded twice.
    if x.dtype == scale.dtype or (x.is_cuda and shift is None):
        total.addcmul_(x, scale[:, None, None])
        return total if shift is None else total.add_(shift[:, None, None])
    return total.add_(affine_map(x, torch.zeros_like(scale), scale, shift))


def _backward_of_map(
    d: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """scale·d, Σ d·(x - mean) and Σ d, those that are needed, in one call."""
    ones = torch.ones_like(scale)
    # The saved statistics are not used without `train`, but some kernels insist on them.
    return torch.ops.aten.native_batch_norm_backward(
        d, x, scale, mean, ones, mean, ones, False, 0.0, needs
    )


def _may_differ_from_0(vector: torch.Tensor) -> bool:
    """Whether adding the vector could change anything. Only for the CPU, where looking costs nothing."""
    return not is_eager() or bool(vector.any())


def in_format_of(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """d in x's memory format, which the gradient of x then has as well."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return d.contiguous(memory_format=torch.channels_last)
    return d.contiguous() if x.is_contiguous() else d
