"""
Normalization batches: a batch of images that a norm sees as several smaller ones, in order.

This is how the papers study small batches at a large gradient batch; it is also known as ghost batch
normalization (Hoffer et al. 2017, Train longer, generalize better, https://arxiv.org/abs/1705.08741).
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..ops import channel_mean_var


class NormBatches:
    """
    N images cut into G normalization batches of `size` consecutive images, the last one perhaps smaller.

    The statistics of all of them are computed in one pass: the N·C planes of H×W values become the
    channels of one image, whose per-channel sums are then added up over the images of each
    normalization batch. Where there is only one, x stays as it is.
    """

    def __init__(self, shape: Sequence[int], size: int):
        """
        Args:
            shape: that of the input, (N, C, H, W).
            size: images in a normalization batch; 0 stands for all.
        """
        self.shape = shape
        self.size = size if 0 < size < shape[0] else shape[0]
        self.num = -(-shape[0] // self.size)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """x, or if it is cut its planes in the shape (1, N·C, H, W)."""
        if self.num == 1:
            return x
        n, c, h, w = self.shape
        return x.contiguous().view(1, n * c, h, w)

    def join(self, planes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`split` for a new tensor, in the memory format of `like`."""
        if self.num == 1:
            return planes
        # In place: autograd forbids a ReLU to modify a view that a custom function returns.
        joined = planes.resize_(self.shape)
        if like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last):
            return joined
        return joined.contiguous(memory_format=torch.channels_last)

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums per channel of :meth:`split`'s result, added up per normalization batch: (G, C)."""
        if self.num == 1:
            return sums[None]
        n, c = self.shape[:2]
        padded = F.pad(sums.view(n, c), (0, 0, 0, self.num * self.size - n))
        return padded.view(self.num, self.size, c).sum(1)

    def sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums per channel of :meth:`split`'s result, added up over all images: (C,)."""
        return sums if self.num == 1 else sums.view(self.shape[:2]).sum(0)

    def mean(self, means: torch.Tensor) -> torch.Tensor:
        """Means per channel of :meth:`split`'s result as those of each normalization batch: (G, C)."""
        if self.num == 1:
            return means[None]
        area = self.shape[2] * self.shape[3]
        return self.total(means * area) / self.counts(means)

    def spread(self, statistic: torch.Tensor) -> torch.Tensor:
        """A statistic of shape (G, C) for the channels of :meth:`split`'s result."""
        if self.num == 1:
            return statistic[0]
        return statistic.repeat_interleave(self.size, 0)[: self.shape[0]].flatten()

    def counts(self, like: torch.Tensor) -> int | torch.Tensor:
        """How many values of a channel each normalization batch has: a number, or shape (G, 1)."""
        n, _, h, w = self.shape
        if n % self.size == 0:
            return self.size * h * w
        counts = like.new_full((self.num, 1), self.size * h * w)
        counts[-1] = (n % self.size) * h * w
        return counts


def batch_moments(
    x: torch.Tensor, batches: NormBatches, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and biased variance of each normalization batch.

    Args:
        x: shape (N, C, H, W), not empty.
        dtype: of the results, at least float32.

    Returns:
        two tensors of shape (G, C).
    """
    mean, var = channel_mean_var(batches.split(x), dtype)
    if batches.num == 1:
        return mean[None], var[None]
    of_batch = batches.mean(mean)  # from that of each image's planes
    deviation = mean - batches.spread(of_batch)
    return of_batch, batches.mean(var + deviation.square())
