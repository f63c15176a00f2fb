"""The memory of batch statistics over iterations."""

import warnings

import torch
from torch import nn

from ..ops import Recorded, constant, record


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

    @torch.jit.unused
    @property
    def rows(self) -> torch.Tensor:
        """0 to `size` - 1, int64."""
        return constant(torch.arange, self.size, dtype=torch.long, device=self.values.device)

    def push(self, statistics: torch.Tensor) -> Recorded:
        """Records G statistics in order, shape (G, *shape)."""
        return record(statistics, self.values, self.count)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        change = adapt_ring_buffer(self, state_dict, prefix)
        if change:  # Python shows the same warning once, so not for each norm of a model
            warnings.warn(f"Ring buffers were {change}", stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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


def adapt_ring_buffer(ring: RingBuffer, state_dict: dict, prefix: str) -> str:
    """
    Makes the entries of a ring buffer in a state dict such that they fit and belong together, in place.

    Rows are resampled to the ring's size. Where the values have another shape or are not finite, or where
    one of `values` and `count` is missing, both are set to those of a new ring.

    Args:
        ring: what the state dict is for; it is not changed.
        prefix: of the ring's entries.

    Returns:
        what was changed, in words; "" for nothing.
    """
    values, count = state_dict.get(prefix + "values"), state_dict.get(prefix + "count")
    if values is None and count is None:
        return ""
    if values is None or count is None:
        change = "started anew, as a part is missing"
    elif values.shape[1:] != ring.values.shape[1:]:
        change = "started anew, as the channels differ"
    elif not values.isfinite().all():
        change = "started anew, as not all values are finite"
    elif len(values) == ring.size:
        return ""
    else:
        state_dict[prefix + "values"] = resample(values, int(count), ring.size)
        return f"resampled from {len(values)} to {ring.size} rows"
    state_dict[prefix + "values"] = torch.zeros_like(ring.values)
    state_dict[prefix + "count"] = torch.zeros_like(ring.count)
    return change
