"""What a norm takes from a batch, per channel and normalization batch."""

import torch

from ..layers import MABN2d
from ..layers.norm_batch import NormBatches
from ..ops import channel_mean_var


def batch_moments(x: torch.Tensor, batches: NormBatches) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and biased variance of each normalization batch.

    Args:
        x: shape (N, C, H, W), not empty.

    Returns:
        two tensors of shape (G, C), at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = channel_mean_var(batches.split(x), dtype)
    if batches.num == 1:
        return mean[None], var[None]
    of_batch = batches.mean(mean)
    deviation = mean - batches.spread(of_batch)
    return of_batch, batches.mean(var + deviation.square())


def projections(
    d: torch.Tensor,
    x: torch.Tensor,
    batches: NormBatches,
    mean: torch.Tensor,
    inv_std: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Σ d and Σ d·(x - mean)·inv_std of each normalization batch, in one pass and without a temporary.

    Args:
        d, x: shape (N, C, H, W).
        mean, inv_std: shape (G, C).

    Returns:
        two tensors of shape (G, C).
    """
    means, inv_stds = batches.spread(mean), batches.spread(inv_std)
    planes = batches.split(x)
    _, sum_dy, sum_d = torch.ops.aten.native_batch_norm_backward(
        batches.split(d.to(x.dtype)), planes, torch.ones_like(means), None, None,
        means, inv_stds, True, 0.0, [False, True, True],
    )  # fmt: skip
    return batches.total(sum_d), batches.total(sum_dy)


def moving_average_and_r(norm: MABN2d) -> tuple[torch.Tensor, torch.Tensor]:
    """χ̄² and r as the last forward pass of a MABN has used them, shape (G, C)."""
    factors = norm._last_statistics
    return factors.squared - norm.eps, factors.unit * factors.squared.sqrt()


def psi_average(norm: MABN2d) -> torch.Tensor:
    """ψ̄ as the last backward pass of a MABN has used it, shape (C,)."""
    values, count = norm.psi.values, norm.psi.count
    newest = values.index_select(0, ((count - 1) % len(values)).view(1))[0]
    return torch.where(count <= norm.average_start_iter, newest, values.mean(0))
