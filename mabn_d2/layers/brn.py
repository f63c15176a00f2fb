"""
Batch Renormalization.

Paper: Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
Ioffe 2017, https://arxiv.org/abs/1702.03275
"""

import torch

from ..ops import constant
from .batch_norm import BatchStatisticsNorm2d, Normalization
from .options import (
    AtLeastOne,
    Fraction,
    NonNegativeNumber,
    PositiveInteger,
    PositiveNumber,
    Schedule,
    checked,
)


class BRN2d(BatchStatisticsNorm2d):
    """
    Batch Renormalization over a 4-D input (N, C, H, W).

    Forward in training, per channel, with BN's running statistics μ, σ before their update:

        r   = clip(σ_B / σ, 1 / r_max, r_max)           constant in backward
        d   = clip((μ_B - μ) / σ, -d_max, d_max)        constant in backward
        out = γ·(r·(x - μ_B) / σ_B + d) + β

    where σ² and σ_B² contain ε. r_max grows linearly from 1 and d_max from 0 to their final values:
    with r_max = 1 and d_max = 0 this is BN. In evaluation it is BN, and so are its parameters and
    buffers. `num_batches_tracked` counts the iterations; with a `norm_batch_size`, an iteration is a
    normalization batch.
    """

    @checked
    def __init__(
        self,
        num_features: PositiveInteger,
        eps: PositiveNumber = 1e-5,
        momentum: Fraction = 0.01,
        r_max: AtLeastOne = 3.0,
        r_max_iters: Schedule = (5000, 40000),
        d_max: NonNegativeNumber = 5.0,
        d_max_iters: Schedule = (5000, 25000),
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            num_features: C of the input (N, C, H, W).
            eps: ε, added to the variances.
            momentum: weight of the new value in the running statistics, as in `nn.BatchNorm2d`.
            r_max: final bound of r.
            r_max_iters: between which iterations the bound of r grows.
            d_max: final bound of d.
            d_max_iters: between which iterations the bound of d grows.
            affine: whether to learn γ (`weight`) and β (`bias`), shape (C,).
            device, dtype: of the parameters and statistics; the latter are at least float32.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__(num_features, eps, momentum, affine)
        self.r_max, self.r_max_iters = r_max, tuple(r_max_iters)
        self.d_max, self.d_max_iters = d_max, tuple(d_max_iters)
        self.to(device=device, dtype=dtype)

    def _normalization(self, mean, var, counts):
        bounds = self._bounds(len(mean), mean.dtype)  # before this iteration is counted
        running_mean, running_var = self._update_running_statistics(mean, var, counts)
        if not self.renormalize:
            return Normalization(mean, var)
        r_max, d_max, d_min = bounds
        squared, running_squared = torch._foreach_add([var, running_var], self.eps)  # σ_B², σ²
        r = (squared / running_squared).sqrt_().clamp_(1 / r_max, r_max)
        d = ((mean - running_mean) * running_squared.rsqrt_()).clamp_(d_min, d_max)
        return Normalization(mean, var, r=r, d=d)

    def _bounds(self, num: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """r_max, d_max and -d_max of each of the next `num` iterations, shape (num, 1)."""
        iters = self.num_batches_tracked.view(1, 1)
        like = dict(dtype=torch.float64, device=iters.device)
        if num > 1:
            iters = iters + torch.arange(num, device=iters.device)[:, None]
        starts, ends = zip(self.r_max_iters, self.d_max_iters, self.d_max_iters)
        lengths = tuple(max(end - start, 1) for start, end in zip(starts, ends))
        progress = (iters - constant(torch.tensor, starts, **like)) / constant(
            torch.tensor, lengths, **like
        )
        first = constant(torch.tensor, (1.0, 0.0, 0.0), **like)
        growth = constant(torch.tensor, (self.r_max - 1, self.d_max, -self.d_max), **like)
        bounds = torch.addcmul(first, growth, progress.clamp_(0, 1))
        return bounds.to(dtype)[:, :, None].unbind(1)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, r_max_iters={self.r_max_iters}, "
            f"d_max={self.d_max}, d_max_iters={self.d_max_iters}"
        )
