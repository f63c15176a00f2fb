"""What the norms of this package have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .moving_average import Statistics
from .norm_batch import NormBatches


def _is_schedule(value) -> bool:
    return len(value) == 2 and 0 <= value[0] <= value[1]


# What the options of all norms take: in words, and as a test.
_ACCEPTED = {
    "num_features": ("a positive integer", lambda value: value >= 1),
    "eps": ("a positive number", lambda value: value > 0),
    "momentum": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "buffer_size": ("a positive integer", lambda value: value >= 1),
    "warmup_iters": ("a non-negative integer", lambda value: value >= 0),
    "renorm_clip": ("a number of at least 1", lambda value: value >= 1),
    "renorm_start_iter": ("a non-negative integer", lambda value: value >= 0),
    "r_max": ("a number of at least 1", lambda value: value >= 1),
    "r_max_iters": ("two iterations (start, end), 0 <= start <= end", _is_schedule),
    "d_max": ("a non-negative number", lambda value: value >= 0),
    "d_max_iters": ("two iterations (start, end), 0 <= start <= end", _is_schedule),
    "memory_size": ("a positive integer", lambda value: value >= 1),
    "current_weight": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "decay": ("a number in (0, 1]", lambda value: 0 < value <= 1),
}


def check_options(options: dict[str, Any], describe: Callable[[str], str]) -> None:
    """
    Raises:
        ValueError: an option is out of its range. The message begins with `describe(option)`.
    """
    for option, value in options.items():
        accepted, is_accepted = _ACCEPTED[option]
        if not is_accepted(value):
            raise ValueError(f"{describe(option)} must be {accepted}, got {value}")


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Norm2d(Statistics):
    """
    A norm over a 4-D input (N, C, H, W) that gathers statistics in training and is an affine map
    per channel in evaluation.

    A subclass has `num_features`, `eps`, `affine`, `weight`, `bias`, `running_var` and `running_mean`,
    the latter None where it does not center, and implements :meth:`_update_statistics` and :meth:`_normalize`.

    If the affine parameters do not require grad, the layer is frozen: it normalizes with the
    running statistics and updates nothing, as `FrozenBatchNorm2d` does. An empty input is passed
    through the evaluation's map and leaves no trace in the statistics.
    """

    # Images in a normalization batch, see `norm_batch.py`; 0 stands for all of the input's.
    norm_batch_size: int = 0
    # Off, nothing pulls the output towards the running statistics.
    renormalize: bool = True
    _last_statistics = None

    def __getstate__(self):
        return {**self.__dict__, "_last_statistics": None}

    @property
    def frozen(self) -> bool:
        """Whether the affine parameters exist and none of them requires grad."""
        return self.affine and not (self.weight.requires_grad or self.bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, C, H, W), any float dtype and memory format; N·H·W may be 0.

        Returns:
            tensor of x's shape, dtype and memory format.

        Raises:
            ValueError: x is not 4-D or does not have `num_features` channels.
        """
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects an input of shape (N, {self.num_features}, H, W), "
                f"got {tuple(x.shape)}"
            )
        if not self.training or self.frozen or x.numel() == 0:
            return self._affine_map(x)
        # Activation checkpointing runs the forward a second time.
        if self._last_statistics is None or not _in_backward():
            batches = NormBatches(x.shape, self.norm_batch_size)
            self._last_statistics = self._update_statistics(x, batches)
        return self._normalize(x, self._last_statistics)

    def _update_statistics(self, x: torch.Tensor, batches: NormBatches) -> Any:
        """Takes notice of a batch, and returns what :meth:`_normalize` needs of the statistics."""
        raise NotImplementedError

    def _normalize(self, x: torch.Tensor, statistics: Any) -> torch.Tensor:
        """The output in training."""
        raise NotImplementedError

    def _float(self, parameter: nn.Parameter | None) -> torch.Tensor | None:
        """The parameter in the type of the statistics, which `.half()` leaves as they are."""
        return None if parameter is None else parameter.to(self.running_var.dtype)

    def _affine_map(self, x: torch.Tensor) -> torch.Tensor:
        """γ·(x - μ) / sqrt(σ² + ε) + β with the running statistics."""
        if self.frozen and x.requires_grad:
            # The fused op would keep x for its backward, which nobody needs.
            scale, shift = self.scale_and_shift()
            return torch.addcmul(
                shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None]
            )
        mean = self.running_mean
        if mean is None:
            mean = torch.zeros_like(self.running_var)
        return F.batch_norm(
            x, mean, self.running_var, self._float(self.weight), self._float(self.bias),
            training=False, eps=self.eps,
        )  # fmt: skip

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The map of evaluation as `out = scale·x + shift`, both of shape (C,)."""
        scale = (self.running_var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = torch.zeros_like(scale) if self.bias is None else self.bias
        return scale, shift if self.running_mean is None else shift - scale * self.running_mean
