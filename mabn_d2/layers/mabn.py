"""
Moving Average Batch Normalization.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, https://arxiv.org/abs/2001.06838
Authors' release: https://github.com/megvii-model/MABN
"""
import contextlib
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from .moving_average import MovingAverage, Statistics, record_and_average


_ACCEPTED = {
    "num_features": ("a positive integer", lambda value: value >= 1),
    "eps": ("a positive number", lambda value: value > 0),
    "momentum": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "buffer_size": ("a positive integer", lambda value: value >= 1),
    "warmup_iters": ("a non-negative integer", lambda value: value >= 0),
    "renorm_clip": ("a number of at least 1", lambda value: value >= 1),
    "renorm_start_iter": ("a non-negative integer", lambda value: value >= 0),
}


def check_options(options: Dict[str, Any], describe: Callable[[str], str]) -> None:
    """
    Raises:
        ValueError: an option is out of its range. The message begins with `describe(option)`.
    """
    for option, value in options.items():
        accepted, is_accepted = _ACCEPTED[option]
        if not is_accepted(value):
            raise ValueError(f"{describe(option)} must be {accepted}, got {value}")


def channel_dot(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Σ a·b over all but the channel dimension, accumulated in `dtype`.

    BN's backward contains this reduction, fused and without a temporary; nothing else in PyTorch
    offers it at that speed.

    Args:
        a, b: shape (N, C, H, W).

    Returns:
        tensor of shape (C,), type `dtype`.
    """
    ones = torch.ones(a.shape[1], dtype=dtype, device=a.device)
    zeros = torch.zeros_like(ones)
    return torch.ops.aten.native_batch_norm_backward(
        a, b, ones, zeros, ones, None, None, False, 0.0, [False, True, False]
    )[1]


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _MABNFunction(torch.autograd.Function):
    """
    out = γ·r·z + β with z = x / sqrt(χ̄² + ε), and the backward pass with a moving average of ψ.

    PyTorch's batch norm in its inference form is exactly the affine map of the forward pass, and
    its backward yields g / sqrt(χ̄² + ε), Σ d·z and Σ d in one fused call. What BN has no counterpart
    for, the term z·ψ̄ / sqrt(χ̄² + ε), is one in-place multiply-add. Backward keeps the input and
    vectors of C values.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, second_moment, r, loss_scale, psi_values, psi_count, psi_warmup, eps
    ):
        scale = r if weight is None else r * weight  # γ·r
        mean = torch.zeros_like(second_moment)
        ctx.save_for_backward(x, scale, second_moment, r)
        ctx.loss_scale, ctx.eps = loss_scale, eps
        ctx.psi_values, ctx.psi_count, ctx.psi_warmup = psi_values, psi_count, psi_warmup
        return F.batch_norm(x, mean, second_moment, scale, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, scale, second_moment, r = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        mean = torch.zeros_like(second_moment)
        grad_x, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
            d, x, scale, mean, second_moment, None, None,
            False, ctx.eps, [needs_x, needs_x or needs_weight, needs_bias],
        )  # fmt: skip
        if needs_x:
            psi = scale * sum_dz / (x.numel() // x.shape[1])  # ψ_B = mean(g·z)
            if ctx.loss_scale is not None:  # the buffer is in the unit of the unscaled loss
                psi = psi / ctx.loss_scale
            psi = record_and_average(psi, ctx.psi_values, ctx.psi_count, ctx.psi_warmup)
            if ctx.loss_scale is not None:
                psi = psi * ctx.loss_scale
            if x.dtype == psi.dtype:
                coefficient = psi / (second_moment + ctx.eps)
                grad_x.addcmul_(x, coefficient[:, None, None], value=-1)
            else:
                # z·ψ̄/χ̄ computed in float32 without a float32 copy of x, as the line above makes one.
                weight = psi * (second_moment + ctx.eps).rsqrt()
                grad_x -= F.batch_norm(x, mean, second_moment, weight, training=False, eps=ctx.eps)
        grad_weight = r * sum_dz if needs_weight else None
        return (grad_x, grad_weight, sum_d) + (None,) * 7


class MABN2d(Statistics):
    """
    Moving Average Batch Normalization over a 4-D input (N, C, H, W).

    For training with few images per GPU, where BN's batch statistics are too noisy. It divides by
    the root second moment in place of centering and dividing by the standard deviation, which is
    why the convolution in front must be centralized (:class:`CenConv2d`). That leaves one batch
    statistic in the forward pass and one in the backward pass; moving averages stabilize both.
    There are more definitions than one of the details; this is the authors' released code.

    Forward in training, iteration t, per channel:

        χ²_B = mean(x²)                                     batch second moment
        χ̄²   = mean of the last m values of χ²_B            `second_moment`
        χ̂²   ← (1 - momentum)·χ̂² + momentum·χ̄²              `running_var`
        z    = x / sqrt(χ̄² + ε)
        r    = clip(sqrt(χ̄² + ε) / sqrt(χ̂² + ε), 1/λ, λ)    χ̂² before its update, constant in backward
        out  = γ·r·z + β

    Backward, with d = ∂L/∂out:

        g     = d·γ·r
        ψ_B   = mean(g·z)
        ψ̄     = mean of the last m values of ψ_B            `psi`
        ∂L/∂x = (g - z·ψ̄) / sqrt(χ̄² + ε),   ∂L/∂γ = Σ d·r·z,   ∂L/∂β = Σ d

    In evaluation: out = γ·x / sqrt(χ̂² + ε) + β, an affine map that folds into the convolution.
    While t ≤ m or t < `warmup_iters`, χ̄² = χ²_B and ψ̄ = ψ_B; while t ≤ `renorm_start_iter` or
    t ≤ `warmup_iters`, r = 1.

    If the affine parameters do not require grad, the layer is frozen: it normalizes with the
    running statistic and updates nothing, as `FrozenBatchNorm2d` does. An empty input is passed
    through the evaluation's map and leaves no trace in the statistics.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.02,
        buffer_size: int = 16,
        warmup_iters: int = 100,
        renorm_clip: float = 5.0,
        renorm_start_iter: int = 1000,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            num_features: C of the input (N, C, H, W).
            eps: ε, added to the second moments.
            momentum: weight of the new value in the running statistic χ̂², as in `nn.BatchNorm2d`.
                The paper's α is 1 - momentum.
            buffer_size: m, how many batches a moving average spans. The paper averages over 32
                images: m = 32 / (images per GPU).
            warmup_iters: iterations that use the batch's own statistics. It is never less than
                `buffer_size`.
            renorm_clip: λ ≥ 1, the bound of r.
            renorm_start_iter: last iteration with r = 1.
            affine: whether to learn γ (`weight`) and β (`bias`), shape (C,).
            device, dtype: of the parameters and statistics; the latter are at least float32.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        check_options(
            {
                "num_features": num_features,
                "eps": eps,
                "momentum": momentum,
                "buffer_size": buffer_size,
                "warmup_iters": warmup_iters,
                "renorm_clip": renorm_clip,
                "renorm_start_iter": renorm_start_iter,
            },
            lambda option: f"MABN2d: {option}",
        )
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.warmup_iters = warmup_iters
        self.renorm_clip = renorm_clip
        self.renorm_start_iter = max(renorm_start_iter, warmup_iters)
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_var", torch.ones(num_features))
        self.second_moment = MovingAverage(num_features, buffer_size, warmup_iters)
        self.psi = MovingAverage(num_features, buffer_size, warmup_iters)
        self.grad_scaler = None
        self._last_statistics = None
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def __getstate__(self):
        return {**self.__dict__, "grad_scaler": None, "_last_statistics": None}

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
                f"MABN2d expects an input of shape (N, {self.num_features}, H, W), "
                f"got {tuple(x.shape)}"
            )
        if not self.training or self.frozen or x.numel() == 0:
            return self._affine_map(x)
        if self._last_statistics is not None and _in_backward():  # activation checkpointing runs the forward a second time
            second_moment, r = self._last_statistics
        else:
            second_moment, r = self._last_statistics = self._update_statistics(x)
        loss_scale = None
        if self.grad_scaler is not None:  # `scale` does not wait for the device
            loss_scale = self.grad_scaler.scale(torch.ones_like(r[0]))
        return _MABNFunction.apply(
            x, self._float(self.weight), self._float(self.bias), second_moment, r, loss_scale,
            self.psi.values, self.psi.count, self.psi.warmup_iters, self.eps,
        )  # fmt: skip

    def _float(self, parameter: Optional[nn.Parameter]) -> Optional[torch.Tensor]:
        """The parameter in the type of the statistics, which `.half()` leaves as they are."""
        return None if parameter is None else parameter.to(self.running_var.dtype)

    @torch.no_grad()
    def _update_statistics(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """χ̄² and r of this iteration, both of shape (C,)."""
        sum_of_squares = channel_dot(x, x, self.running_var.dtype)
        second_moment = self.second_moment(sum_of_squares / (x.numel() // self.num_features))
        renorm = self.second_moment.count > self.renorm_start_iter
        r = ((second_moment + self.eps) / (self.running_var + self.eps)).sqrt()
        r = torch.where(renorm, r.clamp(1 / self.renorm_clip, self.renorm_clip), 1.0)
        self.running_var.lerp_(second_moment, self.momentum)
        return second_moment, r

    def _affine_map(self, x: torch.Tensor) -> torch.Tensor:
        """γ·x / sqrt(χ̂² + ε) + β."""
        if self.frozen and x.requires_grad:
            # The fused op would keep x for its backward, which nobody needs.
            scale, shift = self.scale_and_shift()
            return torch.addcmul(
                shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None]
            )
        mean = torch.zeros_like(self.running_var)
        return F.batch_norm(
            x, mean, self.running_var, self._float(self.weight), self._float(self.bias),
            training=False, eps=self.eps,
        )  # fmt: skip

    def scale_and_shift(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """The map of evaluation as `out = scale·x + shift`, both of shape (C,)."""
        scale = (self.running_var + self.eps).rsqrt()
        if not self.affine:
            return scale, torch.zeros_like(scale)
        return scale * self.weight, self.bias

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Also takes the keys of the authors' release."""
        if prefix + "iters" in state_dict:
            count = state_dict.pop(prefix + "iters").reshape(())
            running_var = state_dict[prefix + "running_var"]
            state_dict[prefix + "running_var"] = running_var.reshape(-1)
            for theirs, ours in [("buffer_x2", "second_moment"), ("buffer_gz", "psi")]:
                # Iteration t, counted from 1, is in row t there and in row t - 1 here.
                values = state_dict.pop(prefix + theirs).roll(-1, 0)
                state_dict[f"{prefix}{ours}.values"] = values
                state_dict[f"{prefix}{ours}.count"] = count.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, buffer_size={self.psi.buffer_size}, "
            f"warmup_iters={self.warmup_iters}, renorm_clip={self.renorm_clip}, "
            f"renorm_start_iter={self.renorm_start_iter}, affine={self.affine})"
        )


@contextlib.contextmanager
@torch.no_grad()
def population_statistics(model: nn.Module) -> Iterator[None]:
    """
    Estimates the running statistics of every MABN from the batches that are run in the block.

    Inside, the model runs in training mode with fixed weights. On leaving, `running_var` of a layer
    is the mean of x² over everything it has seen, and its moving averages are what they were. This
    is for MABN what `fvcore.nn.precise_bn` is for BN. Frozen layers are left alone.
    """
    layers = [m for m in model.modules() if isinstance(m, MABN2d) and m.training and not m.frozen]
    states = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in layers]
    renorm_start_iters = [layer.renorm_start_iter for layer in layers]
    sums = [torch.zeros_like(layer.running_var, dtype=torch.float64) for layer in layers]
    counts = [0] * len(layers)

    def record(index):
        def hook(layer, args):
            (x,) = args
            if x.numel() > 0:
                sums[index] += channel_dot(x.detach(), x.detach(), layer.running_var.dtype)
                counts[index] += x.numel() // layer.num_features

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(record(index)))
        layer.renorm_start_iter = float("inf")  # r would pull towards the old running statistic
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, state, start in zip(layers, states, renorm_start_iters):
            layer.load_state_dict(state)
            layer.renorm_start_iter = start
    for layer, total, count in zip(layers, sums, counts):
        if count:
            layer.running_var.copy_(total / count)


def follow_grad_scaler(model: nn.Module, grad_scaler) -> None:
    """
    Tells every MABN of a model by which scaler the loss is multiplied before `backward()`.

    Under mixed precision the gradients arrive multiplied by a loss scale that changes. With this one
    line after the scaler is made, the ψ buffers stay free of it. Detectron2's `AMPTrainer` does it
    by itself.

    Args:
        model: any module; norms that are added later are not told.
        grad_scaler: a `torch.amp.GradScaler`, or None for a loss that is not scaled.
    """
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.grad_scaler = grad_scaler
