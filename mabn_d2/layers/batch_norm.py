"""Batch Normalization over normalization batches, and what norms with its statistics share."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import (
    add_affine_,
    exponential_averages,
    normalization_backward,
)
from .norm import Norm2d
from .norm_batch import NormBatches, batch_moments


class Normalization(NamedTuple):
    """out = γ·(r·(x - mean) / sqrt(var + ε) + d) + β, tensors of shape (G, C); constants but for `share`."""

    mean: torch.Tensor
    var: torch.Tensor
    share: torch.Tensor | None = None  # (G, 1): the batch's share of mean and var; None is 1
    r: torch.Tensor | None = None  # None is 1
    d: torch.Tensor | None = None  # None is 0


class _NormalizeFunction(torch.autograd.Function):
    """
    out = scale·z + bias with z = (x - μ) / sqrt(σ² + ε), where `share` of μ and σ² is the batch's own.

    With dμ/dx = share/n and dσ²/dx = 2·share·(x - μ)/n for a batch of n values:

        ∂L/∂x = scale / sqrt(σ² + ε) · (d - share·mean(d) - share·z·mean(d·z))

    A share of 1 (None) makes this BN's backward. With scale = γ·r and bias = β + γ·d_, r and d_ being constants:

        ∂L/∂γ = Σ d·(r·z + d_)                              ∂L/∂β = Σ d
    """

    @staticmethod
    def forward(ctx, x, weight, bias, statistics, eps, norm_batch_size):
        mean, var, share, r, d = statistics
        batches = NormBatches(x.shape, norm_batch_size)
        if weight is None:
            scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        else:
            scale, shift = weight.expand_as(mean), bias.expand_as(mean)
        if d is not None:
            shift = torch.addcmul(shift, scale, d)
        if r is not None:
            scale = scale * r
        ctx.save_for_backward(x, scale, mean, var, share, r, d)
        ctx.eps, ctx.norm_batch_size = eps, norm_batch_size
        spread = batches.spread
        out = F.batch_norm(
            batches.split(x), spread(mean), spread(var), spread(scale), spread(shift),
            training=False, eps=eps,
        )  # fmt: skip
        return batches.join(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, scale, mean, var, share, r, d = ctx.saved_tensors
        batches = NormBatches(x.shape, ctx.norm_batch_size)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        inv_std = (var + ctx.eps).rsqrt()
        if batches.num == 1:
            grad_x, sum_dz, sum_d = normalization_backward(
                d_out,
                x,
                mean[0],
                inv_std[0],
                scale[0],
                None if share is None else share[0],
                needs_x,
            )
            sum_dz, sum_d = sum_dz[None], sum_d[None]
        else:
            spread, x_planes = batches.spread, batches.split(x)
            grad_x, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
                batches.split(d_out), x_planes, spread(scale), spread(mean), spread(var),
                spread(mean), spread(inv_std), False, ctx.eps, [needs_x, True, True],
            )  # fmt: skip
            sum_dz, sum_d = batches.total(sum_dz), batches.total(sum_d)
            if needs_x:  # as yet scale / sqrt(σ² + ε) · d
                factor = -scale * inv_std / batches.counts(scale)
                if share is not None:
                    factor = factor * share
                slope = factor * inv_std * sum_dz
                add_affine_(grad_x, x_planes, spread(slope), spread(factor * sum_d - slope * mean))
                grad_x = batches.join(grad_x, x)
        grad_weight = sum_dz if r is None else r * sum_dz
        if d is not None:
            grad_weight = torch.addcmul(grad_weight, d, sum_d)
        grad_weight = _total(grad_weight) if needs_weight else None
        return grad_x, grad_weight, _total(sum_d) if needs_bias else None, None, None, None


def _total(vectors: torch.Tensor) -> torch.Tensor:
    """The sum of vectors, shape (G, C) -> (C,)."""
    return vectors[0] if len(vectors) == 1 else vectors.sum(0)


class BatchStatisticsNorm2d(Norm2d, nn.BatchNorm2d):
    """
    Base of the norms that are BN with other statistics in training.

    They have BN's parameters and buffers under BN's names and are BN in evaluation, so to anything
    that handles BN (freezing, folding, weight decay, conversion to `FrozenBatchNorm2d`) they are BN.
    """

    def _update_statistics(self, x: torch.Tensor, batches: NormBatches) -> Normalization:
        with torch.no_grad():
            mean, var = batch_moments(x, batches, self.running_var.dtype)
            counts = batches.counts(var)
            return self._normalization(mean, var, counts)

    def _normalization(self, mean: torch.Tensor, var: torch.Tensor, counts) -> Normalization:
        """
        Takes notice of the statistics of G normalization batches.

        Args:
            mean, var: shape (G, C), the variance biased.
            counts: values per channel, a number or shape (G, 1).
        """
        raise NotImplementedError

    def _normalize(self, x: torch.Tensor, statistics: Normalization) -> torch.Tensor:
        return _NormalizeFunction.apply(
            x, self._float(self.weight), self._float(self.bias), statistics, self.eps,
            self.norm_batch_size,
        )  # fmt: skip

    def _update_running_statistics(self, mean: torch.Tensor, var: torch.Tensor, counts):
        """
        BN's update, but for values that are not finite, which are left out.

        Returns:
            running_mean and running_var before each of the normalization batches, shape (G, C).
        """
        others = max(counts - 1, 1) if isinstance(counts, int) else (counts - 1).clamp(min=1)
        unbiased = var * (counts / others)
        running = [self.running_mean, self.running_var]
        before = exponential_averages(running, [mean, unbiased], self.momentum)
        self.num_batches_tracked += len(mean)
        return before


class GhostBatchNorm2d(BatchStatisticsNorm2d):
    """
    `nn.BatchNorm2d` that takes its statistics from groups of `norm_batch_size` images.

    The output, the gradients and the running statistics are those of BN called on each group in turn.
    """

    frozen = False  # as nn.BatchNorm2d, which normalizes with the batch whatever requires grad

    def _normalization(self, mean, var, counts):
        self._update_running_statistics(mean, var, counts)
        return Normalization(mean, var)
