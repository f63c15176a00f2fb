"""Reductions and maps per channel, from PyTorch's fused batch norm primitives."""

import torch
from torch.nn import functional as F


def second_moment_about(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """
    mean((x - shift)²) over all but the channel dimension, accumulated in the dtype of `shift`.

    BN's backward contains the reductions Σ x·(x - shift) and Σ x, fused and without a temporary;
    nothing else in PyTorch offers them at that speed.

    Args:
        x: shape (N, C, H, W), not empty.
        shift: shape (C,).

    Returns:
        tensor of shape (C,), type of `shift`.
    """
    count = x.numel() // x.shape[1]
    ones = torch.ones_like(shift)
    # The saved statistics are not used without `train`, but some CUDA kernels insist on them.
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        x, x, ones, shift, ones, shift, ones, False, 0.0, [False, True, True]
    )
    return ((dot - shift * total) / count + shift.square()).clamp(min=0)


def channel_mean_var(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and biased variance over all but the channel dimension, in BN's own reduction.

    Args:
        x: shape (N, C, H, W).

    Returns:
        two tensors of shape (C,), type `dtype`.
    """
    # The operator computes in the type of the running statistics that it is given.
    unused = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    return torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)


def add_affine_(
    total: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """
    total + scale·x + shift per channel, in place.

    Args:
        total, x: shape (N, C, H, W), of one dtype.
        scale, shift: shape (C,), at least float32. The map is computed in this type.
    """
    if x.dtype == scale.dtype:
        total.addcmul_(x, scale[:, None, None])
        return total if shift is None else total.add_(shift[:, None, None])
    # BN's inference form computes in the type of its vectors, without a copy of x in that type. The
    # variance and eps, which must be positive, add up to 1.
    mean, var = torch.zeros_like(scale), torch.full_like(scale, 0.5)
    return total.add_(F.batch_norm(x, mean, var, scale, shift, training=False, eps=0.5))
