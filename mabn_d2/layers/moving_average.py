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


class MovingAverage(Statistics):
    """
    Simple moving average (SMA) of a per-channel batch statistic.

    A ring buffer holds the statistic of the last `buffer_size` batches. A call pushes the statistic
    of the current batch and returns the mean of the buffer. While fewer than `buffer_size` values
    were seen, or fewer than `warmup_iters`, it returns the value it was given: early in training
    the statistics move faster than an average can follow.

    A statistic with a value that is not finite, as an overflow under mixed precision leaves it, is
    not recorded. Nothing here waits for the device: the schedule is evaluated on tensors.

    Buffers:
        values: float tensor of shape (buffer_size, num_features), the recorded statistics.
        count: int64 tensor of shape (), how many statistics were recorded since the start.
    """

    def __init__(self, num_features: int, buffer_size: int, warmup_iters: int):
        super().__init__()
        self.buffer_size = buffer_size
        self.warmup_iters = warmup_iters
        self.register_buffer("values", torch.zeros(buffer_size, num_features))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Records `value`, shape (num_features,), and returns the average, same shape."""
        finite = value.isfinite().all()
        slot = (self.count % self.buffer_size).view(1)
        oldest = self.values.index_select(0, slot)
        self.values.index_copy_(0, slot, torch.where(finite, value, oldest))
        self.count += finite
        # The release's `t <= m or t < warmup_iters`, t counted from 1.
        warming_up = self.count <= max(self.buffer_size, self.warmup_iters - 1)
        return torch.where(finite & warming_up, value, self.values.mean(0))
