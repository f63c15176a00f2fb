"""What the norms of this package have in common."""

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .norm_batch import NormBatches
from .ring_buffer import Statistics


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Norm2d(Statistics):
    """
    A norm over a 4-D input (N, C, H, W) that gathers statistics in training and is an affine map
    per channel in evaluation.

    A subclass has `num_features`, `eps`, `affine`, `weight`, `bias`, `running_mean` and `running_var`,
    and implements :meth:`_update_statistics` and :meth:`_normalize`.

    If the affine parameters do not require grad, the layer is frozen: it normalizes with the
    running statistics and updates nothing, as `FrozenBatchNorm2d` does. An empty input is passed
    through the evaluation's map and leaves no trace in the statistics.
    """

    # Whether the convolution in front needs a kernel of mean zero, as the norm does not center.
    needs_centralized_kernel: bool = False
    # Images in a normalization batch, see `norm_batch.py`; 0 stands for all of the input's.
    norm_batch_size: int = 0
    # Off, nothing pulls the output towards the running statistics.
    renormalize: bool = True
    _last_statistics = None

    def __getstate__(self):
        return {**self.__dict__, "_last_statistics": None}

    @torch.jit.unused
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
        if torch.jit.is_scripting():
            out = self._evaluate(x)
        else:
            out = self._forward(x)
        return out

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, fx.Proxy):
            return self._stay_whole(x)
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects an input of shape (N, {self.num_features}, H, W), "
                f"got {tuple(x.shape)}"
            )
        if not self.training or self.frozen or x.numel() == 0:
            return self._affine_map(x)
        # Activation checkpointing runs the forward a second time.
        if self._last_statistics is None or not in_backward():
            batches = NormBatches(x.shape, self.norm_batch_size)
            self._last_statistics = self._update_statistics(x, batches)
        return self._normalize(x, self._last_statistics)

    def _stay_whole(self, x: fx.Proxy) -> fx.Proxy:
        """For `torch.fx`, which looks into every module that is not PyTorch's: this one is called."""
        name = x.tracer.path_of_module(self)  # type: ignore[attr-defined]
        if name == "":  # the norm itself is what is traced
            return self._evaluate(x)
        return x.tracer.create_proxy("call_module", name, (x,), {})

    def _update_statistics(self, x: torch.Tensor, batches: NormBatches) -> Any:
        """Takes notice of a batch, and returns what :meth:`_normalize` needs of the statistics."""
        raise NotImplementedError

    def _normalize(self, x: torch.Tensor, statistics: Any) -> torch.Tensor:
        """The output in training."""
        raise NotImplementedError

    @torch.no_grad()
    def set_population_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        """
        Makes evaluation use the moments of the whole population.

        Args:
            mean, var: of the norm's input, the variance biased; shape (C,).
        """
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    def _float(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
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
        return self._evaluate(x)

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self._float(self.weight), self._float(self.bias),
            training=False, eps=self.eps,
        )  # fmt: skip

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The map of evaluation as `out = scale·x + shift`, both of shape (C,)."""
        scale = (self.running_var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = torch.zeros_like(scale) if self.bias is None else self.bias
        return scale, shift - scale * self.running_mean
