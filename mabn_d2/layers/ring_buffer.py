"""The memory of batch statistics over iterations, and the averages that stabilize them."""

import logging
from typing import NamedTuple

import torch
from torch import nn

logger = logging.getLogger(__name__)


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


class RingBuffer(Statistics):
    """
    The last `size` of the statistics that were pushed, one per batch.

    A statistic with a value that is not finite, as an overflow under mixed precision leaves it, is not
    recorded. Nothing here waits for the device.

    A state of another size is resampled when it is loaded: fewer rows keep the newest, more rows
    repeat the mean of those there, and the count stays what it is.

    Buffers:
        values: float tensor of shape (size, *shape); statistic number t, counted from 0, is in row
            t modulo size.
        count: int64 tensor of shape (), how many statistics were recorded since the start.
    """

    def __init__(self, size: int, *shape: int):
        """
        Args:
            size: how many statistics are kept.
            shape: of one statistic.
        """
        super().__init__()
        self.register_buffer("values", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.jit.unused
    @property
    def size(self) -> int:
        """How many statistics are kept."""
        return len(self.values)

    def push(self, statistics: torch.Tensor) -> Recorded:
        """Records G statistics in order, shape (G, *shape)."""
        return record(statistics, self.values, self.count)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        adapt_ring_buffer(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@torch.no_grad()
def record(statistics: torch.Tensor, values: torch.Tensor, count: torch.Tensor) -> Recorded:
    """
    Pushes statistics into a ring buffer, in order and in place.

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

    While no more than `warmup_iters` statistics were recorded it is the statistic itself: early in
    training the statistics move faster than an average can follow.

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


def resample(values: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """
    The content of a ring buffer for one of another size.

    Args:
        values: shape (m, ...), of which the first `count` pushes are recorded.
        count: how many statistics were recorded since the start.
        size: m', rows of the result.

    Returns:
        shape (m', ...): the newest of the recorded statistics where the same count puts them; the rows
        of older ones, which the given buffer does not have, are the mean of those there.
    """
    old = len(values)
    numbers = range(max(0, count - old), count)  # of the statistics there
    if not numbers:
        return values.new_zeros(size, *values.shape[1:])
    there = values[[number % old for number in numbers]]
    resampled = there.mean(0).expand(size, *values.shape[1:]).clone()
    for number in numbers[-size:]:
        resampled[number % size] = values[number % old]
    return resampled


def adapt_ring_buffer(ring: RingBuffer, state_dict: dict, prefix: str) -> bool:
    """
    Makes the entries of a ring buffer in a state dict such that they fit and belong together, in place.

    Rows are resampled to the ring's size. Where the values have another shape or are not finite, or where
    one of `values` and `count` is missing, both are set to those of a new ring.

    Args:
        ring: what the state dict is for; it is not changed.
        prefix: of the ring's entries.

    Returns:
        whether anything was changed.
    """
    keys = values_key, count_key = prefix + "values", prefix + "count"
    values, count = (state_dict.get(key) for key in keys)
    if values is None and count is None:
        return False
    name = prefix.rstrip(".") or "ring buffer"
    if values is None or count is None or values.shape[1:] != ring.values.shape[1:]:
        found = "incomplete" if values is None or count is None else tuple(values.shape)
        logger.warning("%s starts anew: the file's is %s", name, found)
    elif not values.isfinite().all():
        logger.warning("%s starts anew: the file's is not finite", name)
    elif len(values) == ring.size:
        return False
    else:
        logger.info("%s: %d rows of the file become %d", name, len(values), ring.size)
        state_dict[values_key] = resample(values, int(count), ring.size)
        return True
    state_dict[values_key] = torch.zeros_like(ring.values)
    state_dict[count_key] = torch.zeros_like(ring.count)
    return True
