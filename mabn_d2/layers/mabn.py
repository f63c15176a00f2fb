"""
Moving Average Batch Normalization.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, https://arxiv.org/abs/2001.06838
Authors' release: https://github.com/megvii-model/MABN
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import add_affine_, second_moment_about
from .norm import Norm2d
from .norm_batch import NormBatches
from .options import (
    AtLeastOne,
    BatchesOf32Images,
    Fraction,
    IterationCount,
    PositiveInteger,
    PositiveNumber,
    checked,
)
from .ring_buffer import RingBuffer, exponential_average, record_and_average


class _MABNFunction(torch.autograd.Function):
    """
    out = γ·r·z + β with z = (x - s) / sqrt(χ̄² + ε), and the backward pass with a moving average of ψ.

    PyTorch's batch norm in its inference form is exactly the affine map of the forward pass, and
    its backward yields g / sqrt(χ̄² + ε), Σ d·z and Σ d in one fused call. What BN has no counterpart
    for, the term z·ψ̄ / sqrt(χ̄² + ε), is one in-place multiply-add. Backward keeps the input and
    vectors of C values.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, shift, second_moment, r, loss_scale, psi_values, psi_count,
        warmup_iters, eps, norm_batch_size,
    ):  # fmt: skip
        batches = NormBatches(x.shape, norm_batch_size)
        scale = r if weight is None else r * weight  # γ·r
        ctx.save_for_backward(x, scale, shift, second_moment, r)
        ctx.loss_scale, ctx.eps, ctx.norm_batch_size = loss_scale, eps, norm_batch_size
        ctx.psi_values, ctx.psi_count, ctx.warmup_iters = psi_values, psi_count, warmup_iters
        spread = batches.spread
        out = F.batch_norm(
            batches.split(x), spread(shift.expand_as(scale)), spread(second_moment), spread(scale),
            bias if bias is None else spread(bias.expand_as(scale)), training=False, eps=eps,
        )  # fmt: skip
        return batches.join(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, scale, shift, second_moment, r = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        batches = NormBatches(x.shape, ctx.norm_batch_size)
        spread, x_planes = batches.spread, batches.split(x)
        shifts, moments = spread(shift.expand_as(scale)), spread(second_moment)
        grad_x, sum_dz, sum_d = torch.ops.aten.native_batch_norm_backward(
            batches.split(d), x_planes, spread(scale), shifts, moments,
            shifts, (moments + ctx.eps).rsqrt(), False, ctx.eps,
            [needs_x, needs_x or needs_weight, needs_bias],
        )  # fmt: skip
        if needs_x or needs_weight:
            sum_dz = batches.total(sum_dz)
        if needs_x:
            psi = scale * sum_dz / batches.counts(scale)  # ψ_B = mean(g·z)
            if ctx.loss_scale is not None:  # the buffer is in the unit of the unscaled loss
                psi = psi / ctx.loss_scale
            psi = record_and_average(psi, ctx.psi_values, ctx.psi_count, ctx.warmup_iters)
            if ctx.loss_scale is not None:
                psi = psi * ctx.loss_scale
            slope = -spread(psi) / (moments + ctx.eps)
            add_affine_(grad_x, x_planes, slope, -slope * shifts)
            grad_x = batches.join(grad_x, x)
        grad_weight = (r * sum_dz).sum(0) if needs_weight else None
        grad_bias = batches.total(sum_d).sum(0) if needs_bias else None
        return (grad_x, grad_weight, grad_bias) + (None,) * 9


class MABN2d(Norm2d):
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
    All of this is about a constant shift s, `running_mean`: x above stands for x - s. It is 0 unless the
    weights were imported from a norm that centers, whose mean it is then.
    While t ≤ m or t < `warmup_iters`, χ̄² = χ²_B and ψ̄ = ψ_B; while t ≤ `renorm_start_iter` or
    t ≤ `warmup_iters`, r = 1.

    With a `norm_batch_size`, an iteration is a normalization batch.
    """

    needs_centralized_kernel = True

    @checked
    def __init__(
        self,
        num_features: PositiveInteger,
        eps: PositiveNumber = 1e-5,
        momentum: Fraction = 0.02,
        buffer_size: BatchesOf32Images = 16,
        warmup_iters: IterationCount = 100,
        renorm_clip: AtLeastOne = 5.0,
        renorm_start_iter: IterationCount = 1000,
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
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.second_moment = RingBuffer(buffer_size, num_features)
        self.psi = RingBuffer(buffer_size, num_features)
        self.grad_scaler = None
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def __getstate__(self):
        return {**super().__getstate__(), "grad_scaler": None}

    @torch.no_grad()
    def _update_statistics(
        self, x: torch.Tensor, batches: NormBatches
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """χ̄² and r of this iteration, both of shape (G, C)."""
        shift = batches.spread(self.running_mean.expand(batches.num, -1))
        second_moment = batches.mean(second_moment_about(batches.split(x), shift))
        ring = self.second_moment
        second_moment = record_and_average(
            second_moment, ring.values, ring.count, self.average_start_iter
        )
        running_var = exponential_average(self.running_var, second_moment, self.momentum)
        if not self.renormalize:
            return second_moment, torch.ones_like(second_moment)
        r = ((second_moment + self.eps) / (running_var + self.eps)).sqrt()
        r = r.clamp(1 / self.renorm_clip, self.renorm_clip)
        return second_moment, torch.where(self._may_renormalize(batches.num), r, 1.0)

    @torch.no_grad()
    def set_population_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        self.running_var.copy_(var + (mean - self.running_mean).square())

    @torch.jit.unused
    @property
    def average_start_iter(self) -> int:
        """The last iteration with χ̄² = χ²_B and ψ̄ = ψ_B."""
        # The release compares with `t <= m or t < warmup_iters`, t counted from 1.
        return max(self.psi.size, self.warmup_iters - 1)

    def _may_renormalize(self, num: int) -> torch.Tensor:
        """For each of the last `num` normalization batches, whether r may differ from 1: (num, 1)."""
        count = self.second_moment.count
        if num > 1:
            count = (count - torch.arange(num - 1, -1, -1, device=count.device))[:, None]
        return count > self.renorm_start_iter

    def _normalize(self, x: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor]):
        second_moment, r = statistics
        loss_scale = None
        if self.grad_scaler is not None:  # `scale` does not wait for the device
            loss_scale = self.grad_scaler.scale(torch.ones_like(r[0, 0]))
        return _MABNFunction.apply(
            x, self._float(self.weight), self._float(self.bias), self.running_mean, second_moment, r,
            loss_scale, self.psi.values, self.psi.count, self.average_start_iter, self.eps,
            self.norm_batch_size,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """
        Also takes the keys of the authors' release, and files without a shift.

        The mean of a norm that centers is not a shift by itself: it belongs to the uncentralized kernel.
        """
        if prefix + "iters" in state_dict:
            count = state_dict.pop(prefix + "iters").reshape(())
            running_var = state_dict[prefix + "running_var"]
            state_dict[prefix + "running_var"] = running_var.reshape(-1)
            for theirs, ours in [("buffer_x2", "second_moment"), ("buffer_gz", "psi")]:
                # Iteration t, counted from 1, is in row t there and in row t - 1 here.
                values = state_dict.pop(prefix + theirs).roll(-1, 0)
                state_dict[f"{prefix}{ours}.values"] = values
                state_dict[f"{prefix}{ours}.count"] = count.clone()
        is_ours = prefix + "psi.count" in state_dict
        if prefix + "running_var" in state_dict and not (
            is_ours and prefix + "running_mean" in state_dict
        ):
            state_dict[prefix + "running_mean"] = torch.zeros_like(self.running_mean)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, buffer_size={self.psi.size}, "
            f"warmup_iters={self.warmup_iters}, renorm_clip={self.renorm_clip}, "
            f"renorm_start_iter={self.renorm_start_iter}, affine={self.affine})"
        )
