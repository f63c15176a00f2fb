"""The simple moving average that stabilizes a batch statistic over iterations."""
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
            if now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self


@torch.no_grad()
def record_and_average(
    value: torch.Tensor, values: torch.Tensor, count: torch.Tensor, warmup_iters: int
) -> torch.Tensor:
    """
    Pushes a statistic into a ring buffer, in place, and returns the mean of the buffer.

    While no more than `warmup_iters` statistics were recorded it returns `value` itself. A statistic
    with a value that is not finite, as an overflow under mixed precision leaves it, is not recorded.
    Nothing here waits for the device: the schedule is evaluated on tensors.

    Args:
        value: statistic of the current batch, shape (C,).
        values: the ring buffer, shape (m, C).
        count: how many statistics were recorded since the start, int64 of shape ().
    """
    finite = torch.linalg.vector_norm(value, float("inf")) < float("inf")
    slot = (count % len(values)).view(1)
    oldest = values.index_select(0, slot)
    values.index_copy_(0, slot, torch.where(finite, value, oldest))
    count += finite
    return torch.where(finite & (count <= warmup_iters), value, values.mean(0))


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

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Records `value`, shape (num_features,), and returns the average, same shape."""
        return record_and_average(value, self.values, self.count, self.warmup_iters)
