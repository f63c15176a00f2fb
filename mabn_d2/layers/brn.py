"""
Batch Renormalization.

Paper: Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
Ioffe 2017, https://arxiv.org/abs/1702.03275
"""

import torch

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
        iters = self.num_batches_tracked + torch.arange(len(mean), device=mean.device)[:, None]
        running_mean, running_var = self._update_running_statistics(mean, var, counts)
        if not self.renormalize:
            return Normalization(mean, var)
        sigma = (running_var + self.eps).sqrt()
        r_max = _grow(1.0, self.r_max, self.r_max_iters, iters).to(sigma.dtype)
        d_max = _grow(0.0, self.d_max, self.d_max_iters, iters).to(sigma.dtype)
        r = ((var + self.eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
        return Normalization(mean, var, r=r, d=d)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, r_max_iters={self.r_max_iters}, "
            f"d_max={self.d_max}, d_max_iters={self.d_max_iters}"
        )


def _grow(first: float, last: float, between: tuple[int, int], iters: torch.Tensor) -> torch.Tensor:
    """A value that grows linearly between two iterations, at each of `iters`."""
    start, end = between
    progress = ((iters - start).double() / max(end - start, 1)).clamp(0, 1)
    return first + (last - first) * progress
