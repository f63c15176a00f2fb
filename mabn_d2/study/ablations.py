"""
MABN and MBN with one piece changed, to find out what each piece is worth. Nothing here is a recommendation.

`--import mabn_d2.study.ablations` makes the norms below known to a config under their names, as `MABN_Centered`, and
their options as `MODEL.MABN_Centered.BUFFER_SIZE`. Notation and defaults are those of :class:`MABN2d`: t counts
batches from 1, d = ∂L/∂out, and "own" is the warm-up t ≤ m or t < `warmup_iters`, in which an average is the batch's
own statistic. Each formula below says what differs from MABN, everything else is the same.

====================  ============================================================================
name                  formula
====================  ============================================================================
MABN_NoCentralization the kernels in front stay as they are
MABN_Centered         BN's four statistics, each a moving average: see :class:`CenteredMABN2d`
MABN_Shift            x - s for x, with s following the batches' mean; no centralization
MABN_CentralizedShift x - s for x, and centralized kernels
MABN_ForwardOnly      ψ̄ = ψ_B
MABN_BackwardOnly     χ̄² = χ²_B and r = 1
MABN_FromStart        r from the second batch on, χ̂² with a momentum of max(`momentum`, 1/t)
MABN_PsiWarmUp        ψ̄ = ψ_B in the first batches after weights of BN were imported
MABN_Growing          averages of the last min(m, max(1, ⌊t / `warmup_iters`⌋)) batches
MABN_Rescaled         stored χ²_B and χ̂² follow ‖W‖² of the kernel in front
MBN_Memory            evaluation with w_i ∝ decay^i, the last batch not set apart
====================  ============================================================================

Options of MABN itself give the rest. With `MODEL.MABN.`:

- no moving average at all (χ̄² = χ²_B, ψ̄ = ψ_B, r = 1): `BUFFER_SIZE 1`, `RENORM_START_ITER 1000000000`. As r
  cancels χ̄² after `renorm_start_iter`, a buffer of 1 alone leaves the average of χ̂² in the forward pass.
- r off (r = 1 for good, the moving averages stay): `RENORM_START_ITER 1000000000`.
- no clip of r: `RENORM_CLIP 1000000.0`, which float32 cannot tell from none.
- averages as short or long as wanted: `BUFFER_SIZE`, `WARMUP_ITERS`, `MOMENTUM`, `LAG`.
- warm-up tied to the schedule: `WARMUP_ITERS` and `RENORM_START_ITER` count iterations, so give them those of
  `SOLVER.WARMUP_ITERS`, or of a first step in `SOLVER.STEPS`.

The weights move while a moment is stored, which Cross-Iteration BN (Yao et al. 2021, https://arxiv.org/abs/2002.05712)
compensates to first order: (W - W_i)·∂χ²_i/∂W for the batch i. That takes a second kernel gradient in each
convolution, a third more of its time, and m copies of every kernel. `MABN_Rescaled` keeps of it what costs nothing, and is
exact there: the change of a kernel in scale. Neither sees that the input of the layer changes with the layers in front of it.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..layers import BatchStatisticsNorm2d, CenConv2d, MABN2d, MBN2d, RingBuffer
from ..layers.norm_batch import NormBatches
from ..ops import (
    affine_map,
    affine_map_backward,
    constant,
    exponential_averages,
    gradient_sums,
    mabn_forward_factors,
    record,
    record_and_average,
    record_one,
    second_moment_about,
)
from ..plugin import NORM_REGISTRY


def _moments(
    x: torch.Tensor, batches: NormBatches, pivot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each batch, (G, C), in one pass; the more exact, the nearer the pivot (C,)."""
    planes = batches.split(x)
    spread_pivot = batches.spread(pivot.expand(batches.num, -1))
    dot, total = gradient_sums(planes, planes, spread_pivot)  # Σ x·(x - pivot) and Σ x
    dot, mean = (batches.total(sums) / batches.counts(pivot) for sums in (dot, total))
    return mean, (dot - mean * (mean - pivot)).clamp(min=0)


class Factors(NamedTuple):
    """out = γ·(unit·(x - mean) + offset) + β, shape (G, C), and what backward needs; constants."""

    mean: torch.Tensor
    squared: torch.Tensor  # χ̄² + ε or σ̄² + ε
    unit: torch.Tensor  # r / sqrt(squared)
    offset: torch.Tensor | None = None  # None is 0


class _MovingAverageFunction(torch.autograd.Function):
    """
    out = γ·(r·z + offset) + β with z = (x - mean) / sqrt(squared), and a backward pass with given averages.

    With d = ∂L/∂out and g = d·γ·r:

        g_B   = mean(g)                                     Ψ_B   = mean(g·z)
        ∂L/∂x = (g - ḡ - z·Ψ̄) / sqrt(squared)               ∂L/∂γ = Σ d·(r·z + offset),   ∂L/∂β = Σ d
    """

    @staticmethod
    def forward(ctx, x, weight, bias, factors, average_psi, average_g, norm_batch_size):
        mean, _, unit, offset = factors
        batches = NormBatches(x.shape, norm_batch_size)
        ctx.save_for_backward(x, weight, *factors)
        ctx.averages, ctx.norm_batch_size = (average_psi, average_g), norm_batch_size
        scale = unit if weight is None else unit * weight
        shift = torch.zeros_like(unit) if bias is None else bias.expand_as(unit)
        if offset is not None:
            shift = shift + (offset if weight is None else offset * weight)
        spread = batches.spread
        out = affine_map(batches.split(x), spread(mean), spread(scale), spread(shift))
        return batches.join(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, weight, mean, squared, unit, offset = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        average_psi, average_g = ctx.averages
        batches = NormBatches(x.shape, ctx.norm_batch_size)
        spread, num_values = batches.spread, batches.counts(unit)
        weight = torch.ones_like(unit) if weight is None else weight

        def slope(sum_dz):
            return spread(average_psi(weight * batches.total(sum_dz) / num_values) / squared)

        grad_x, sum_dz, sum_d = affine_map_backward(
            batches.split(d), batches.split(x), spread(mean), spread(weight * unit), spread(unit),
            slope, needs_x,
        )  # fmt: skip
        sum_dy = sum_dz if offset is None else torch.addcmul(sum_dz, spread(offset), sum_d)
        if needs_x:
            if average_g is not None:
                g = weight * unit * squared.sqrt() * batches.total(sum_d) / num_values
                grad_x -= spread(average_g(g) * squared.rsqrt())[:, None, None]
            grad_x = batches.join(grad_x, x)
        grad_weight = batches.sum(sum_dy) if needs_weight else None
        grad_bias = batches.sum(sum_d) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _average(statistics: torch.Tensor, ring: RingBuffer, average_start_iter: int) -> torch.Tensor:
    """Means of the last batches, (G, C), or the batch's own in the warm-up."""
    return record_and_average(statistics, ring.values, ring.count, average_start_iter)


class _AblatedMABN2d(MABN2d):
    """A MABN without `lag`, which would mean something else with other averages."""

    @functools.wraps(MABN2d.__init__)  # the options are MABN's
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.lag:
            raise ValueError(f"lag must be 0 for an ablation of the averages, got {self.lag}")

    def _ring(self, size: int) -> RingBuffer:
        return RingBuffer(size, self.num_features).to(self.running_var)

    @torch.jit.unused
    @property
    def average_start_iter(self) -> int:
        return max(self.psi.size, self.second_moment.size, self.warmup_iters - 1)


@NORM_REGISTRY.register(name="MABN_NoCentralization")
class UncentralizedMABN2d(MABN2d):
    """MABN behind kernels as they are: what is normalized is not centered by anything."""

    needs_centralized_kernel = False


@NORM_REGISTRY.register(name="MABN_ForwardOnly")
class ForwardAverageMABN2d(_AblatedMABN2d):
    """ψ̄ = ψ_B: a moving average in the forward pass, and the batch's own ψ in backward."""

    @functools.wraps(MABN2d.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.psi = self._ring(1)


@NORM_REGISTRY.register(name="MABN_BackwardOnly")
class BackwardAverageMABN2d(_AblatedMABN2d):
    """χ̄² = χ²_B and r = 1: nothing but the batch in the forward pass of training, ψ̄ in backward."""

    renormalize = False

    @functools.wraps(MABN2d.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second_moment = self._ring(1)


@NORM_REGISTRY.register(name="MABN_PsiWarmUp")
class PsiWarmUpMABN2d(MABN2d):
    """
    ψ̄ of imported weights warms up, where MABN's is an average over zeros at first.

    A ψ that is loaded as 0 counts from 0: ψ̄ = ψ_B in the next max(m, `warmup_iters` - 1) batches.
    """

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        values, count = (state_dict.get(f"{prefix}psi.{name}") for name in ("values", "count"))
        if values is not None and count is not None and not values.any():
            state_dict[f"{prefix}psi.count"] = torch.zeros_like(count)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _MovingAverageMABN2d(_AblatedMABN2d):
    """Base of those with other factors than MABN's; the loss must not be scaled."""

    def _average(self, statistics: torch.Tensor, ring: RingBuffer) -> torch.Tensor:
        return _average(statistics, ring, self.average_start_iter)

    @torch.no_grad()
    def _update_statistics(self, x, batches):
        shift = self.running_mean.expand(batches.num, -1)
        second_moment = batches.mean(second_moment_about(batches.split(x), batches.spread(shift)))
        average = self._average(second_moment, self.second_moment)
        return self._factors(average, self.second_moment.count, shift)

    def _normalize(self, x, statistics):
        return _MovingAverageFunction.apply(
            x, self._float(self.weight), self._float(self.bias), statistics,
            functools.partial(self._average, ring=self.psi), None, self.norm_batch_size,
        )  # fmt: skip

    def _factors(self, average: torch.Tensor, count: torch.Tensor, mean: torch.Tensor) -> Factors:
        """MABN's factors for the moving averages χ̄² of the last G batches, shape (G, C)."""
        num = len(average)
        factors = mabn_forward_factors(  # of a buffer of one, the mean is what is pushed
            average, torch.zeros_like(average[:1]), count - num, self.running_var, None, 0,
            self.renorm_start_iter if self.renormalize else None, self.renorm_clip, self.momentum,
            self.eps,
        )  # fmt: skip
        return Factors(mean, factors.squared, factors.unit)


@NORM_REGISTRY.register(name="MABN_FromStart")
class EarlyRenormMABN2d(_MovingAverageMABN2d):
    """
    Renormalization from the second batch on; `renorm_start_iter` is without effect.

        χ̂² ← (1 - η)·χ̂² + η·χ̄²,   η = max(`momentum`, 1/t)

    that is the mean of all χ̄² so far until t = 1/`momentum`: r compares with data from the start, not with the
    initial 1.
    """

    def _factors(self, average, count, mean):
        num = len(average)
        t = count - constant(torch.arange, num, dtype=torch.long, device=count.device).flip(0)
        running = []
        for value, momentum in zip(average, t.to(average.dtype).reciprocal()):
            running.append(self.running_var.clone())
            step = (value - self.running_var).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            self.running_var.add_(step * momentum.clamp(min=self.momentum))
        squared = average + self.eps
        ratio = torch.where((t > 1)[:, None], squared / (torch.stack(running) + self.eps), 1.0)
        r = ratio.sqrt().clamp(1 / self.renorm_clip, self.renorm_clip)
        return Factors(mean, squared, r * squared.rsqrt())


@NORM_REGISTRY.register(name="MABN_Shift")
class ShiftedMABN2d(_MovingAverageMABN2d):
    """
    In place of centralized kernels, a shift that follows the batches' mean:

        x stands for x - s,   s ← (1 - `momentum`)·s + `momentum`·μ_B

    s (`running_mean`) is what it was before the batch, starts at 0 and is a constant in backward. χ²_B is about the s
    of its time. Evaluation is about the last s.
    """

    needs_centralized_kernel = False

    @torch.no_grad()
    def _update_statistics(self, x, batches):
        mean, var = _moments(x, batches, self.running_mean)
        (shift,) = exponential_averages([self.running_mean], [mean], self.momentum)
        second_moment = torch.addcmul(var, mean - shift, mean - shift)
        average = self._average(second_moment, self.second_moment)
        return self._factors(average, self.second_moment.count, shift)


@NORM_REGISTRY.register(name="MABN_CentralizedShift")
class CentralizedShiftedMABN2d(ShiftedMABN2d):
    """:class:`ShiftedMABN2d` behind centralized kernels."""

    needs_centralized_kernel = True


@NORM_REGISTRY.register(name="MABN_Growing")
class GrowingMABN2d(_MovingAverageMABN2d):
    """
    Moving averages that span more batches the longer the training:

        χ̄², ψ̄ = means of the last m_t values,   m_t = min(m, max(1, ⌊t / `warmup_iters`⌋))

    in place of a warm-up with a jump to m at its end. t is the number of statistics recorded.
    """

    def _average(self, statistics: torch.Tensor, ring: RingBuffer) -> torch.Tensor:
        size, growth_iters = ring.size, max(1, self.warmup_iters)
        if len(statistics) == 1:
            record_one(statistics, ring.values, ring.count)
            windows, counts = ring.values[None], ring.count.view(1)
            age = (ring.count - 1 - ring.rows) % size
        else:
            windows, counts, _ = record(statistics, ring.values, ring.count)
            age = size - 1 - ring.rows
        spans = (counts // growth_iters).clamp_(1, size)[:, None]
        weights = (age < spans).to(windows.dtype) / spans  # (G, m)
        return torch.bmm(weights[:, None], windows)[:, 0]


@NORM_REGISTRY.register(name="MABN_Rescaled")
class RescaledMABN2d(_AblatedMABN2d):
    """
    Moments that follow the scale of the kernel in front, the norm being that of a convolution, `Conv2d(norm=...)`.

    With q_t = ‖W_t‖² of each filter of the centralized kernel, before batch t all stored χ²_B and χ̂² are multiplied by
    q_t / q_{t-1}. As χ² is quadratic in W, this is what they were for the new scale. ψ does not depend on the scale.

    Attributes:
        has_kernel: whether it has seen the kernel of a convolution.

    Buffers:
        kernel_square: q of the last batch, shape (C,); 0 before the first.
    """

    has_kernel = False

    @functools.wraps(MABN2d.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("kernel_square", torch.zeros_like(self.running_var))

    @torch.no_grad()
    def follow(self, kernel: torch.Tensor) -> None:
        """Takes notice of the kernel that the next batch is computed with, shape (C, ...)."""
        self.has_kernel = True
        square = kernel.to(self.kernel_square.dtype).square().flatten(1).sum(1)
        ratio = torch.where(self.kernel_square > 0, square / self.kernel_square, 1.0)
        self.second_moment.values.mul_(ratio)
        self.running_var.mul_(ratio)
        self.kernel_square.copy_(square)

    def _update_statistics(self, x, batches):
        if not self.has_kernel:
            raise ValueError("MABN_Rescaled must be the norm of a convolution, Conv2d(norm=...)")
        return super()._update_statistics(x, batches)


def _show_kernel(convolution: CenConv2d, args: tuple) -> None:
    """A forward pre-hook."""
    norm = convolution.norm
    if isinstance(norm, RescaledMABN2d) and norm.training and not norm.frozen:
        norm.follow(convolution.centralized_weight())


def _listen_to_convolution(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(submodule, RescaledMABN2d) and isinstance(module, nn.Conv2d):
        module.register_forward_pre_hook(_show_kernel)


register_module_module_registration_hook(_listen_to_convolution)


@NORM_REGISTRY.register(name="MABN_Centered")
class CenteredMABN2d(BatchStatisticsNorm2d):
    """
    All four of BN's batch statistics as moving averages, where MABN started from; kernels are not centralized.

    Forward in training, iteration t:

        μ_B, σ²_B = mean(x), mean((x - μ_B)²)
        μ̄, σ̄²     = means of the last m values              own in the warm-up
        μ̂, σ̂²     ← (1 - `momentum`)·μ̂ + `momentum`·μ̄       and so σ̂² with σ̄²; from 0 and 1
        z         = (x - μ̄) / sqrt(σ̄² + ε)
        r         = clip(sqrt(σ̄² + ε) / sqrt(σ̂² + ε), 1/λ, λ)       as in Batch Renormalization: μ̂, σ̂² before
        δ         = clip((μ̄ - μ̂) / sqrt(σ̂² + ε), -λ, λ)             their update, constants in backward
        out       = γ·(r·z + δ) + β

    Backward, with d = ∂L/∂out:

        g         = d·γ·r
        g_B, Ψ_B  = mean(g), mean(g·z)
        ḡ, Ψ̄      = means of the last m values              own in the warm-up
        ∂L/∂x     = (g - ḡ - z·Ψ̄) / sqrt(σ̄² + ε),   ∂L/∂γ = Σ d·(r·z + δ),   ∂L/∂β = Σ d

    In the warm-up (t ≤ m or t < `warmup_iters`) this is BN; while t ≤ `renorm_start_iter` or t ≤ `warmup_iters`, r = 1 and
    δ = 0. Evaluation is BN's with μ̂ (`running_mean`) and σ̂² (`running_var`). The loss must not be scaled.
    """

    @functools.wraps(MABN2d.__init__)  # the options are MABN's
    def __init__(self, *args, **kwargs):
        own = _AblatedMABN2d(*args, **kwargs)
        super().__init__(own.num_features, own.eps, own.momentum, own.affine)
        num_features, buffer_size = own.num_features, own.psi.size
        self.average_start_iter = own.average_start_iter
        self.renorm_clip = own.renorm_clip
        self.renorm_start_iter = max(own.renorm_start_iter, own.warmup_iters)
        # Of each batch, its means, then its variances.
        self.moments = RingBuffer(buffer_size, 2 * num_features)
        self.g = RingBuffer(buffer_size, num_features)
        self.psi = RingBuffer(buffer_size, num_features)
        self.to(own.running_var)

    def _average(self, statistics: torch.Tensor, ring: RingBuffer) -> torch.Tensor:
        return _average(statistics, ring, self.average_start_iter)

    @torch.no_grad()
    def _update_statistics(self, x, batches):
        mean, var = _moments(x, batches, self.running_mean)
        num, count = len(mean), self.moments.count
        mean, var = self._average(torch.cat([mean, var], 1), self.moments).chunk(2, 1)
        running = [self.running_mean, self.running_var]
        running_mean, running_var = exponential_averages(running, [mean, var], self.momentum)
        squared, running_squared = torch._foreach_add([var, running_var], self.eps)
        if not self.renormalize:
            return Factors(mean, squared, squared.rsqrt())
        behind = constant(torch.arange, num, dtype=torch.long, device=mean.device).flip(0)
        is_started = (count - behind > self.renorm_start_iter)[:, None]
        clip = self.renorm_clip
        inverse = running_squared.rsqrt()
        r = torch.where(is_started, (squared.sqrt() * inverse).clamp_(1 / clip, clip), 1.0)
        offset = ((mean - running_mean) * inverse).clamp_(-clip, clip) * is_started
        return Factors(mean, squared, r * squared.rsqrt(), offset)

    def _normalize(self, x, statistics):
        return _MovingAverageFunction.apply(
            x, self._float(self.weight), self._float(self.bias), statistics,
            functools.partial(self._average, ring=self.psi),
            functools.partial(self._average, ring=self.g), self.norm_batch_size,
        )  # fmt: skip


@NORM_REGISTRY.register(name="MBN_Memory")
class EvenMemoryMBN2d(MBN2d):
    """
    MBN whose evaluation has no current batch, and so none with a weight of its own:

        μ_E  = Σ w_i·μ_i,   σ²_E = Σ w_i·(σ²_i + (μ_i - μ_E)²),   w_i = decay^i / Σ_j decay^j

    over the batches in the memory, i = 0 being the newest. The rule is the paper's, a combination of the remembered
    batches whose newest has the largest weight. With the default `decay` and `memory_size` the weights are worth
    13 batches; those of :class:`MBN2d`, with half of the weight on the last one, are worth 4. Training is MBN's.
    """

    def _normalization(self, mean, var, counts):
        normalization = super()._normalization(mean, var, counts)
        memory = self.memory
        there = memory.count.clamp(max=memory.size)
        age = (memory.count - 1 - memory.rows) % memory.size
        weights = self.decay ** age.to(memory.values.dtype) * (age < there)
        weights = (weights / weights.sum())[:, None]
        means, variances = memory.values.unbind(1)  # (k, C)
        mean = (weights * means).sum(0)
        var = (weights * torch.addcmul(variances, means - mean, means - mean)).sum(0)
        self.running_mean.copy_(torch.where(there > 0, mean, self.running_mean))
        self.running_var.copy_(torch.where(there > 0, var, self.running_var))
        return normalization
