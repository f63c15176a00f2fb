"""The averages over iterations that stabilize batch statistics."""

from typing import NamedTuple

import torch
from torch import nn


class Statistics(nn.Module):
    """
    Base of modules whose buffers are statistics: `.half()` and the like leave them in float32.

    A second moment overflows float16 where |x| > 255.
    """

    def _apply(self, fn, *args, **kwargs):
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self


def is_finite(statistics: torch.Tensor) -> torch.Tensor:
    """For each of G statistics, shape (G, ...), whether all of its values are finite: (G,)."""
    return torch.linalg.vector_norm(statistics.flatten(1), float("inf"), dim=1) < float("inf")


class Recorded(NamedTuple):
    """What a ring buffer of m statistics held after each of G statistics was pushed."""

    windows: torch.Tensor  # (G, m, ...), the oldest first
    counts: torch.Tensor  # (G,), how many had been recorded since the start
    finite: torch.Tensor  # (G,), whether the statistic itself was recorded


@torch.no_grad()
def record(statistics: torch.Tensor, values: torch.Tensor, count: torch.Tensor) -> Recorded:
    """
    Pushes statistics into a ring buffer, in order and in place.

    One with a value that is not finite, as an overflow under mixed precision leaves it, is not
    recorded. Nothing here waits for the device.

    Args:
        statistics: shape (G, ...).
        values: the ring buffer, shape (m, ...).
        count: how many statistics were recorded since the start, int64 of shape ().
    """
    finite = is_finite(statistics)
    recorded = finite.cumsum(0)
    slots = torch.arange(len(values), device=values.device)
    past = values.index_select(0, (count + slots) % len(values))
    order = torch.argsort((~finite).byte(), stable=True)  # CUDA does not sort booleans
    keep = finite.index_select(0, order).view(-1, *[1] * (statistics.dim() - 1))
    new = torch.where(keep, statistics.index_select(0, order), 0.0)
    windows = torch.cat([past, new]).unfold(0, len(values), 1).movedim(-1, 1)
    windows = windows.index_select(0, recorded)
    counts = count + recorded
    count.copy_(counts[-1])
    values.index_copy_(0, (count + slots) % len(values), windows[-1])
    return Recorded(windows, counts, finite)


@torch.no_grad()
def record_and_average(
    statistics: torch.Tensor, values: torch.Tensor, count: torch.Tensor, warmup_iters: int
) -> torch.Tensor:
    """
    :func:`record`, and the mean of the ring buffer after each statistic.

    While no more than `warmup_iters` statistics were recorded it is the statistic itself.

    Returns:
        tensor like `statistics`.
    """
    if len(statistics) > 1:
        windows, counts, finite = record(statistics, values, count)
        averages = windows.mean(1)
    else:  # the same, with the fewest operations
        counts = count
        finite = is_finite(statistics)
        slot = (count % len(values)).view(1)
        values.index_copy_(0, slot, torch.where(finite, statistics, values.index_select(0, slot)))
        count += finite[0]
        averages = values.mean(0, keepdim=True)
    is_warmup = (finite & (counts <= warmup_iters))[:, None]
    return torch.where(is_warmup, statistics, averages)


@torch.no_grad()
def exponential_average(
    running: torch.Tensor, statistics: torch.Tensor, momentum: float
) -> torch.Tensor:
    """
    Moves a running statistic towards G statistics in order: running ← (1 - momentum)·running + momentum·s.

    A value that is not finite moves nothing.

    Args:
        running: shape (C,), changed in place.
        statistics: shape (G, C).

    Returns:
        what it was before each of the statistics, shape (G, C).
    """
    before = []
    for statistic in statistics:
        before.append(running.clone())
        running.lerp_(torch.where(statistic.isfinite(), statistic, running), momentum)
    return torch.stack(before)


class MovingAverage(Statistics):
    """
    Simple moving average (SMA) of a per-channel batch statistic over the last `buffer_size` batches.

    While fewer than `buffer_size` batches were seen, or fewer than `warmup_iters`, the average is
    the statistic of the current batch: early in training the statistics move faster than an average
    can follow.

    Buffers:
        values: float tensor of shape (buffer_size, num_features), the recorded statistics.
        count: int64 tensor of shape (), how many statistics were recorded since the start.
    """

    def __init__(self, num_features: int, buffer_size: int, warmup_iters: int):
        super().__init__()
        self.buffer_size = buffer_size
        # The release compares with `t <= m or t < warmup_iters`, t counted from 1.
        self.warmup_iters = max(buffer_size, warmup_iters - 1)
        self.register_buffer("values", torch.zeros(buffer_size, num_features))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, statistics: torch.Tensor) -> torch.Tensor:
        """Records G statistics in order, shape (G, num_features); returns the average after each."""
        return record_and_average(statistics, self.values, self.count, self.warmup_iters)
