"""
Records the statistics that normalization layers take from each batch.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, section 3 and Figure 2, https://arxiv.org/abs/2001.06838
"""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import MABN2d, Norm2d
from ..layers.norm import in_backward
from ..layers.norm_batch import NormBatches, batch_moments
from .moments import clipped_share, moving_average_and_r, projections, psi_average

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, Norm2d)


class Record(NamedTuple):
    """
    What a layer's statistic was in an iteration.

    Attributes:
        iteration: counted by :meth:`StatisticsRecorder.step` from `start_iter`.
        layer: the module's name in the model.
        quantity: see :class:`StatisticsRecorder`.
        values: one for each normalization batch and call of the layer, in order.
    """

    iteration: int
    layer: str
    quantity: str
    values: tuple[float, ...]


def can_be_recorded(module: nn.Module) -> bool:
    """Whether the module is a norm over a 4-D input whose statistics can be recorded."""
    return isinstance(module, _BATCH_NORMS)


def select_norms(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """
    The norms of a model whose names match a pattern.

    Args:
        model: any module.
        layers: patterns of names as `fnmatch` has them, like `backbone.*.norm`.

    Raises:
        ValueError: a pattern matches no norm of the model.
    """
    norms = {name: module for name, module in model.named_modules() if can_be_recorded(module)}
    for pattern in layers:
        if not fnmatch.filter(norms, pattern):
            names = list(norms)
            shown = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
            raise ValueError(
                f"No norm of the model matches {pattern!r}; its norms are {shown or 'none'}"
            )
    return {
        name: module
        for name, module in norms.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in layers)
    }


class StatisticsRecorder:
    """
    Records the ℓ2 norms over the channels of the batch statistics of every norm of a model.

    With x the layer's input, Y = (x - μ_B) / sqrt(σ²_B + ε), γ the layer's weight and d = ∂L/∂out, per
    channel over a batch of n values:

        mean      ‖μ_B‖      μ_B = mean(x)
        var       ‖σ²_B‖     σ²_B = mean((x - μ_B)²)
        grad_mean ‖g_B‖      g_B = mean(γ·d), the mean of ∂L/∂Y
        grad_dot  ‖Ψ_B‖      Ψ_B = mean(Y·γ·d)

    They are those of the batch for every kind of norm, whatever the norm itself uses, so that norms compare.
    A :class:`MABN2d` also gives what it uses, in the symbols of its docstring:

        second_moment ‖χ²_B‖     second_moment_average ‖χ̄²‖     running_var ‖χ̂²‖
        psi           ‖ψ_B‖      psi_average           ‖ψ̄‖      clipped, the share of channels with r at its bound

    Gradients are those of the unscaled loss, of this worker alone. A layer with a `norm_batch_size` gives one
    value for each normalization batch. Nothing waits for the device but :meth:`flush`, once for
    everything that was recorded since the last. Layers in evaluation mode and empty inputs give nothing,
    nor do calls of the model without gradients, like the second forward pass of Double-Forward.

    Example:
        with StatisticsRecorder(model, ["layer1.*"]) as recorder:
            for batch in batches:
                loss(model(batch)).backward()
                optimizer.step()
                recorder.step()
        recorder.records
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] = ("*",),
        period: int = 1,
        grad_scaler: Any = None,
        start_iter: int = 0,
    ):
        """
        Args:
            model: any module.
            layers: patterns of names, see :func:`select_norms`.
            period: every how many iterations something is recorded.
            grad_scaler: a `torch.amp.GradScaler` by which the loss is multiplied, or None.
            start_iter: the iteration that comes first.

        Raises:
            ValueError: the period is not positive, or a pattern matches no norm of the model.
        """
        if period < 1:
            raise ValueError(f"The period must be a positive integer, got {period}")
        self.layers = select_norms(model, layers)
        self._model = model
        self.period, self.grad_scaler, self.iteration = period, grad_scaler, start_iter
        self.records: list[Record] = []
        self._is_running = False  # a call of the model with gradients
        self._pending: dict[tuple[int, str, str], list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._hook()

    def __enter__(self) -> "StatisticsRecorder":
        return self

    def __exit__(self, *error) -> None:
        self.flush()
        self.remove()

    def step(self) -> None:
        """Ends an iteration, after its backward pass or passes."""
        if self._handles:
            for name, module in self.layers.items():
                if isinstance(module, MABN2d) and (self.iteration, name, "psi") in self._pending:
                    self._add(name, "psi_average", psi_average(module)[None])
        self.iteration += 1
        self._hook()

    @torch.no_grad()
    def flush(self) -> list[Record]:
        """Fetches what was recorded since the last call, appends it to `records` and returns it."""
        pending, self._pending = self._pending, {}
        values = [torch.cat(parts) for parts in pending.values()]
        if not values:
            return []
        fetched = torch.cat([value.double() for value in values]).cpu()
        parts = fetched.split([len(value) for value in values])
        new = [Record(*key, tuple(part.tolist())) for key, part in zip(pending, parts)]
        self.records += new
        return new

    def remove(self) -> None:
        """Stops listening to the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self) -> None:
        """Listens in the iterations that are recorded, and only then."""
        is_recorded = self.iteration % self.period == 0
        if is_recorded and not self._handles:
            model = self._model
            self._handles = [model.register_forward_pre_hook(lambda *_: self._run(True))]
            for name, module in self.layers.items():
                self._handles.append(module.register_forward_hook(self._listener(name)))
            self._handles.append(
                model.register_forward_hook(lambda *_: self._run(False), always_call=True)
            )
        elif not is_recorded:
            self.remove()

    def _run(self, is_start: bool) -> None:
        self._is_running = is_start and torch.is_grad_enabled()

    def _listener(self, name: str):
        def listen(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            (x,) = args
            is_training_pass = self._is_running or in_backward()
            if is_training_pass and module.training and x.dim() == 4 and x.numel():
                self._record_forward(name, module, x.detach(), out)

        return listen

    def _add(self, name: str, quantity: str, statistics: torch.Tensor) -> None:
        """
        Args:
            statistics: shape (G, C).
        """
        norms = torch.linalg.vector_norm(statistics, dim=1)
        self._pending.setdefault((self.iteration, name, quantity), []).append(norms)

    @torch.no_grad()
    def _record_forward(
        self, name: str, module: nn.Module, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        batches = NormBatches(x.shape, getattr(module, "norm_batch_size", 0))
        mean, var = batch_moments(x, batches, torch.promote_types(x.dtype, torch.float32))
        used, r = moving_average_and_r(module) if isinstance(module, MABN2d) else (None, None)
        if not in_backward():  # else activation checkpointing runs the forward a second time
            self._add(name, "mean", mean)
            self._add(name, "var", var)
            if used is not None:
                self._add(name, "second_moment", var + (mean - module.running_mean).square())
                self._add(name, "second_moment_average", used)
                self._add(name, "running_var", module.running_var[None])
                share = clipped_share(module, r)
                self._pending.setdefault((self.iteration, name, "clipped"), []).append(share)
        if not out.requires_grad:
            return

        @torch.no_grad()
        def record_backward(d: torch.Tensor) -> None:
            weight = 1.0 if module.weight is None else module.weight.to(mean.dtype)
            inv_std = (var + module.eps).rsqrt()
            sum_d, sum_dy = projections(d, x, batches, mean, inv_std)
            scale = weight / batches.counts(mean)
            if self.grad_scaler is not None:  # `scale` does not wait for the device
                scale = scale / self.grad_scaler.scale(torch.ones_like(mean[0, 0]))
            self._add(name, "grad_mean", scale * sum_d)
            self._add(name, "grad_dot", scale * sum_dy)
            if used is not None:
                sum_dx = sum_dy / inv_std + (mean - module.running_mean) * sum_d
                inv_root = (used + module.eps).rsqrt()
                self._add(name, "psi", scale * r * inv_root * sum_dx)

        out.register_hook(record_backward)
