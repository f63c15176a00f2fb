"""
Moving Average Batch Normalization.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, https://arxiv.org/abs/2001.06838
Authors' release: https://github.com/megvii-model/MABN
"""

import warnings

import torch
from torch import nn

from ..ops import (
    ForwardFactors,
    affine_map,
    affine_map_backward,
    constant,
    mabn_backward_slope,
    mabn_forward_factors,
    second_moment_about,
    triton_passes_for,
)
from .norm import Norm2d
from .norm_batch import NormBatches
from .options import (
    AtLeastOne,
    BatchesOf32Images,
    Fraction,
    IterationCount,
    Lag,
    PositiveInteger,
    PositiveNumber,
    WarmupIterations,
    checked,
)
from .ring_buffer import RingBuffer


class _MABNFunction(torch.autograd.Function):
    """
    out = γ·ρ·(x - s) + β with ρ = r / sqrt(χ̄² + ε), and the backward pass with a moving average of ψ.

    With d = ∂L/∂out:

        ∂L/∂γ = Σ d·ρ·(x - s)                               ∂L/∂β = Σ d
        ψ_B   = γ·(∂L/∂γ) / n                               which is mean(g·z) of n values
        ∂L/∂x = γ·ρ·d - ψ̄ / (χ̄² + ε)·(x - s)

    Backward keeps the input and vectors of C values.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shift, factors, psi, norm_batch_size, known):
        batches = NormBatches(x.shape, norm_batch_size)
        ctx.save_for_backward(x, weight, shift, *factors)
        ctx.psi, ctx.norm_batch_size = psi, norm_batch_size
        if known:
            return known.pop()
        spread, scale = batches.spread, factors.scale
        bias = None if bias is None else spread(bias.expand_as(scale))
        out = affine_map(batches.split(x), spread(shift.expand_as(scale)), spread(scale), bias)
        return batches.join(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, weight, shift, *factors = ctx.saved_tensors
        unit, scale, squared = factors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        batches = NormBatches(x.shape, ctx.norm_batch_size)
        spread = batches.spread
        lag = ctx.psi[-1]
        kernels = triton_passes_for(x, scale) if lag and needs_x and batches.num == 1 else None

        def slope(sum_dz):
            sum_dz, num_values = batches.total(sum_dz), batches.counts(sum_dz)
            return spread(mabn_backward_slope(sum_dz, num_values, squared, weight, *ctx.psi))

        if kernels is not None:
            grad_x, sum_dz, sum_d = kernels.mabn_backward(d, x, shift, *factors, weight, *ctx.psi)
        else:
            grad_x, sum_dz, sum_d = affine_map_backward(
                batches.split(d), batches.split(x), spread(shift.expand_as(scale)), spread(scale),
                spread(unit), slope, needs_x,
            )  # fmt: skip
            grad_x = batches.join(grad_x, x) if needs_x else None
        grad_weight = batches.sum(sum_dz) if needs_weight else None
        grad_bias = batches.sum(sum_d) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


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

    With a `lag` of 1, after the warm-up χ̄² and ψ̄ are the means of the last m values *before* the current batch,
    whose own are recorded afterwards; χ̂² follows that χ̄². During the warm-up nothing differs.

    With a `norm_batch_size`, an iteration is a normalization batch.
    """

    needs_centralized_kernel = True
    # The output, in a list, where it was known as soon as the statistics were.
    _known = None

    @checked
    def __init__(
        self,
        num_features: PositiveInteger,
        eps: PositiveNumber = 1e-5,
        momentum: Fraction = 0.02,
        buffer_size: BatchesOf32Images = 16,
        warmup_iters: WarmupIterations = 100,
        renorm_clip: AtLeastOne = 5.0,
        renorm_start_iter: IterationCount = 1000,
        lag: Lag = 0,
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
                `buffer_size`. In a config, -1 is those to the first of `SOLVER.STEPS`.
            renorm_clip: λ ≥ 1, the bound of r.
            renorm_start_iter: last iteration with r = 1.
            lag: 1 leaves the current batch out of the moving averages.
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
        self.lag = lag
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
    def _update_statistics(self, x: torch.Tensor, batches: NormBatches) -> ForwardFactors:
        ring = self.second_moment
        renorm_start_iter = self.renorm_start_iter if self.renormalize else None
        arguments = (
            ring.values, ring.count, self.running_var, self._float(self.weight),
            self.average_start_iter, renorm_start_iter, self.renorm_clip, self.momentum, self.eps,
            self.lag,
        )  # fmt: skip
        if batches.num == 1 and self.renormalize:
            kernels = triton_passes_for(x, self.running_var)
            if kernels is not None:
                out, factors = kernels.mabn_forward(
                    x, self.running_mean, self._float(self.bias), *arguments
                )
                self._known = [out]
                return ForwardFactors(*factors)
        shift = batches.spread(self.running_mean.expand(batches.num, -1))
        second_moment = batches.mean(second_moment_about(batches.split(x), shift))
        return mabn_forward_factors(second_moment, *arguments)

    @torch.no_grad()
    def set_population_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        self.running_var.copy_(var + (mean - self.running_mean).square())

    @torch.jit.unused
    @property
    def average_start_iter(self) -> int:
        """The last iteration with χ̄² = χ²_B and ψ̄ = ψ_B."""
        # The release compares with `t <= m or t < warmup_iters`, t counted from 1.
        return max(self.psi.size, self.warmup_iters - 1)

    def _normalize(self, x: torch.Tensor, statistics: ForwardFactors) -> torch.Tensor:
        loss_scale = None
        if self.grad_scaler is not None:  # `scale` does not wait for the device
            one = constant(torch.ones, (), dtype=self.running_var.dtype, device=x.device)
            loss_scale = self.grad_scaler.scale(one)
        psi = loss_scale, self.psi.values, self.psi.count, self.average_start_iter, self.lag
        return _MABNFunction.apply(
            x, self._float(self.weight), self._float(self.bias), self.running_mean, statistics, psi,
            self.norm_batch_size, self._known,
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
        mean = state_dict.get(prefix + "running_mean")
        if not is_ours and mean is not None and mean.any():
            warnings.warn(
                "Weights of BN are loaded into MABN as they are, and are another function there: which "
                "convolution feeds it is not told. mabn_d2.from_bn keeps the function", stacklevel=2,
            )  # fmt: skip
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
            f"renorm_start_iter={self.renorm_start_iter}, lag={self.lag}, affine={self.affine})"
        )
