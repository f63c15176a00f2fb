"""What a norm takes from a batch, per channel and normalization batch."""

import torch

from ..layers import MABN2d
from ..layers.norm_batch import NormBatches
from ..ops import gradient_sums


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
    dot, sum_d = gradient_sums(batches.split(d), batches.split(x), batches.spread(mean))
    return batches.total(sum_d), batches.total(dot) * inv_std


def moving_average_and_r(norm: MABN2d) -> tuple[torch.Tensor, torch.Tensor]:
    """χ̄² and r as the last forward pass of a MABN has used them, shape (G, C)."""
    factors = norm._last_statistics
    return factors.squared - norm.eps, factors.unit * factors.squared.sqrt()


def clipped_share(norm: MABN2d, r: torch.Tensor) -> torch.Tensor:
    """The share of the channels whose r is at its bound, shape (G, C) -> (G,)."""
    bound = norm.renorm_clip * (1 - 1e-5)  # r comes out of float32
    return ((r >= bound) | (r <= 1 / bound)).to(torch.promote_types(r.dtype, torch.float32)).mean(1)


def psi_average(norm: MABN2d) -> torch.Tensor:
    """ψ̄ as the last backward pass of a MABN has used it, shape (C,)."""
    values, count = norm.psi.values, norm.psi.count
    newest = values.index_select(0, ((count - 1) % len(values)).view(1))[0]
    return torch.where(count <= norm.average_start_iter, newest, values.mean(0))
