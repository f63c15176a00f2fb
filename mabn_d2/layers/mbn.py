"""
Memorized Batch Normalization.

Paper: Double Forward Propagation for Memorized Batch Normalization, AAAI 2018,
https://arxiv.org/abs/2010.04947
"""

import torch

from ..ops import constant, record_one
from .batch_norm import BatchStatisticsNorm2d, Normalization
from .options import Fraction, PositiveInteger, PositiveNumber, checked
from .ring_buffer import RingBuffer


class MBN2d(BatchStatisticsNorm2d):
    """
    Memorized Batch Normalization over a 4-D input (N, C, H, W).

    In training it normalizes with a weighted combination of the statistics of the k most recent
    batches, i = 0 being the current one:

        μ_M  = Σ w_i·μ_i                            `running_mean`
        σ²_M = Σ w_i·(σ²_i + (μ_i - μ_M)²)          `running_var`: within and between batches
        out  = γ·(x - μ_M) / sqrt(σ²_M + ε) + β

    The gradient flows through the current batch's share w_0 of μ_M and σ²_M. Evaluation uses μ_M
    and σ²_M as the last training batch left them: the same rule, and an affine map that folds into the
    convolution. The statistics of the remembered batches are of older weights;
    :class:`DoubleForward` renews those of the current batch after the optimizer's step.

    The paper's abstract leaves the weights open, these are our choice: w_0 = `current_weight`, and
    the older batches divide the rest in proportion to decay^i. While the memory is filling,
    the batches that are there divide it. With k = 1 this is BN, but for running statistics, which
    are those of the last batch.

    The defaults were chosen by the runs in docs/experiments.md. A small `current_weight` averages
    the noise of the forward pass well, but leaves most of BN's correction out of the gradient: the
    scale of the layers before the norm then drifts and learning stalls. A large one makes evaluation
    depend on the last batch.

    A batch whose statistics are not finite is not remembered, and normalized with the memory as it
    is. With a `norm_batch_size`, each normalization batch is remembered.
    """

    @checked
    def __init__(
        self,
        num_features: PositiveInteger,
        eps: PositiveNumber = 1e-5,
        memory_size: PositiveInteger = 16,
        current_weight: Fraction = 0.5,
        decay: Fraction = 0.9,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            num_features: C of the input (N, C, H, W).
            eps: ε, added to the variances.
            memory_size: k, how many batches are remembered, the current one included.
            current_weight: w_0, the weight of the current batch.
            decay: ratio of the weight of a remembered batch to that of the next newer one.
            affine: whether to learn γ (`weight`) and β (`bias`), shape (C,).
            device, dtype: of the parameters and statistics; the latter are at least float32.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__(num_features, eps, affine=affine)
        self.current_weight = current_weight
        self.decay = decay
        # Of each batch, its means and biased variances.
        self.memory = RingBuffer(memory_size, 2, num_features)
        self.to(device=device, dtype=dtype)

    def _normalization(self, mean, var, counts):
        memory = self.memory
        statistics = torch.stack([mean, var], 1)
        if len(mean) == 1:
            _, finite = record_one(statistics, memory.values, memory.count)
            count, windows = memory.count.view(1), memory.values[None]
            age = (count - 1 - memory.rows) % memory.size  # of each row
        else:
            windows, count, finite = memory.push(statistics)
            age = memory.size - 1 - memory.rows
        by_age = self._weights.index_select(0, count.clamp(max=memory.size))  # (G, k)
        weights = by_age.index_select(1, age)[:, :, None]
        means, variances = windows.unbind(2)  # (G, k, C)
        mean = (weights * means).sum(1)
        deviation = means - mean[:, None]
        var = (weights * torch.addcmul(variances, deviation, deviation)).sum(1)
        is_empty = (count == 0)[:, None]
        mean = torch.where(is_empty, self.running_mean, mean)
        var = torch.where(is_empty, self.running_var, var)
        self.running_mean.copy_(mean[-1])
        self.running_var.copy_(var[-1])
        self.num_batches_tracked += len(mean)
        if memory.size == 1:
            return Normalization(mean, var)
        return Normalization(mean, var, share=(by_age[:, 0] * finite)[:, None])

    @torch.jit.unused
    @property
    def _weights(self) -> torch.Tensor:
        """Of remembered batches, shape (k + 1, k): row j is for a memory of j batches, column i for age i."""
        like = dict(dtype=self.memory.values.dtype, device=self.memory.values.device)
        return constant(_weights, self.memory.size, self.current_weight, self.decay, **like)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, memory_size={self.memory.size}, "
            f"current_weight={self.current_weight}, decay={self.decay}, affine={self.affine}"
        )


def _weights(size: int, current_weight: float, decay: float, **like) -> torch.Tensor:
    weights = torch.zeros(size + 1, size, dtype=torch.float64)
    for there in range(1, size + 1):
        older = decay ** torch.arange(1, there, dtype=torch.float64)
        weights[there, 0] = current_weight if there > 1 else 1.0
        weights[there, 1:there] = (1 - current_weight) * older / older.sum()
    return weights.to(**like)
