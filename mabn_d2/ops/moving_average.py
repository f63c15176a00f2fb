"""
The averages over iterations that stabilize batch statistics: operations on vectors of C values.

G batches come in order, G being 1 without normalization batches. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch

from .modes import constant, triton_for


def is_finite(statistics: torch.Tensor) -> torch.Tensor:
    """For each of G statistics, shape (G, ...), whether all of its values are finite: (G,)."""
    return torch.linalg.vector_norm(statistics.flatten(1), float("inf"), dim=1) < float("inf")


class Recorded(NamedTuple):
    """What a ring buffer of m statistics held after each of G statistics was pushed."""

    windows: torch.Tensor  # (G, m, ...), the oldest first
    counts: torch.Tensor  # (G,), how many had been recorded since the start
    finite: torch.Tensor  # (G,), whether the statistic itself was recorded


@torch.no_grad()
def record(
    statistics: torch.Tensor, values: torch.Tensor, count: torch.Tensor, lag: int = 0
) -> Recorded:
    """
    Pushes statistics into a ring buffer, in order and in place.

    Args:
        statistics: shape (G, ...).
        values: the ring buffer, shape (m, ...).
        count: how many statistics were recorded since the start, int64 of shape ().
        lag: with 1, the windows are those before a statistic was pushed.
    """
    finite = is_finite(statistics)
    recorded = finite.cumsum(0)
    rows = constant(torch.arange, len(values), dtype=torch.long, device=values.device)
    past = values.index_select(0, (count + rows) % len(values))
    order = torch.argsort((~finite).byte(), stable=True)  # CUDA does not sort booleans
    keep = finite.index_select(0, order).view(-1, *[1] * (statistics.dim() - 1))
    new = torch.where(keep, statistics.index_select(0, order), 0.0)
    contents = torch.cat([past, new]).unfold(0, len(values), 1).movedim(-1, 1)
    windows = contents.index_select(0, recorded - finite.long() if lag else recorded)
    counts = count + recorded
    count.copy_(counts[-1])
    last = contents.index_select(0, recorded[-1:])[0]
    values.copy_(last.index_select(0, (rows - count) % len(values)))
    return Recorded(windows, counts, finite)


@torch.no_grad()
def record_one(
    statistic: torch.Tensor, values: torch.Tensor, count: torch.Tensor, limit: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    :func:`record` for one statistic, shape (1, ...), with the fewest operations.

    Returns:
        whether it was recorded as one of the first `limit`, and whether it was recorded, both of shape ().
    """
    options = dict(dtype=torch.float64, device=values.device)
    largest = torch.linalg.vector_norm(statistic, float("inf"))
    # Counted from 0; NaN if the statistic is not finite, which equals no row and is below no limit.
    number = torch.addcmul(count, largest, constant(torch.zeros, (), **options))
    is_row = constant(torch.arange, len(values), **options) == number % len(values)
    torch.where(is_row.view(-1, *[1] * (values.dim() - 1)), statistic, values, out=values)
    is_early, finite = (number < constant(torch.tensor, (limit, float("inf")), **options)).unbind()
    count += finite
    return is_early, finite


@torch.no_grad()
def record_and_average(
    statistics: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    warmup_iters: int,
    lag: int = 0,
) -> torch.Tensor:
    """
    :func:`record`, and the mean of the ring buffer after each statistic; with a `lag` of 1, before it.

    While no more than `warmup_iters` statistics were recorded it is the statistic itself: early in
    training the statistics move faster than an average can follow.

    Returns:
        tensor like `statistics`.
    """
    if len(statistics) > 1:
        windows, counts, finite = record(statistics, values, count, lag)
        is_warmup = (finite & (counts <= warmup_iters))[:, None]
        return torch.where(is_warmup, statistics, windows.mean(1))
    if lag:
        averages = values.mean(0, keepdim=True)
        is_warmup, _ = record_one(statistics, values, count, warmup_iters)
    else:
        is_warmup, _ = record_one(statistics, values, count, warmup_iters)
        averages = values.mean(0, keepdim=True)
    return torch.where(is_warmup, statistics, averages)


@torch.no_grad()
def exponential_averages(
    running: list[torch.Tensor], statistics: list[torch.Tensor], momentum: float
) -> list[torch.Tensor]:
    """
    Moves running statistics towards those of G batches in order: running ← (1 - momentum)·running + momentum·s.

    A value that is not finite moves nothing.

    Args:
        running: of each statistic the running one, shape (C,), changed in place.
        statistics: of each statistic the values, shape (G, C).

    Returns:
        of each running statistic what it was before each of the batches, shape (G, C).
    """
    before = []
    for values in zip(*statistics):
        before.append([value.clone() for value in running])
        steps = torch._foreach_sub(values, running)
        for step in steps:
            step.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        torch._foreach_add_(running, steps, alpha=momentum)
    return [torch.stack(b) if len(b) > 1 else b[0][None] for b in zip(*before)]


class ForwardFactors(NamedTuple):
    """Of MABN's forward pass for G batches, shape (G, C)."""

    unit: torch.Tensor  # r / sqrt(χ̄² + ε)
    scale: torch.Tensor  # γ·r / sqrt(χ̄² + ε)
    squared: torch.Tensor  # χ̄² + ε


@torch.no_grad()
def mabn_forward_factors(
    second_moment: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None,
    warmup_iters: int,
    renorm_start_iter: int | None,
    renorm_clip: float,
    momentum: float,
    eps: float,
    lag: int = 0,
) -> ForwardFactors:
    """
    Takes notice of the second moments of G batches, and tells by what MABN multiplies its input.

    Args:
        second_moment: χ²_B, shape (G, C).
        values, count: the ring buffer of second moments, changed in place.
        running_var: χ̂², shape (C,), changed in place.
        weight: γ, shape (C,); None is 1.
        warmup_iters: the last iteration with χ̄² = χ²_B.
        renorm_start_iter: the last iteration with r = 1; None is never.
        renorm_clip, momentum, eps, lag: λ, 1 - α, ε and the lag of :class:`MABN2d`.
    """
    kernels = triton_for(values) if len(second_moment) == 1 else None
    if kernels is not None:
        return ForwardFactors(
            *kernels.mabn_forward_factors(
                second_moment, values, count, running_var, weight, warmup_iters, renorm_start_iter,
                renorm_clip, momentum, eps, lag,
            )
        )  # fmt: skip
    moving = record_and_average(second_moment, values, count, warmup_iters, lag)
    if len(moving) == 1:
        squared, running = torch._foreach_add([moving, running_var[None]], eps)
        running_var.lerp_(moving[0], momentum)
    else:
        (running,) = exponential_averages([running_var], [moving], momentum)
        running = running + eps
        squared = moving + eps
    if renorm_start_iter is None:
        unit = squared.rsqrt()
    else:
        is_started = _counts(count, len(moving)) > renorm_start_iter
        ratio = squared / torch.where(is_started, running, squared)
        unit = ratio.clamp_(renorm_clip**-2, renorm_clip**2).div_(squared).sqrt_()
    return ForwardFactors(unit, unit if weight is None else unit * weight, squared)


def _counts(count: torch.Tensor, num: int) -> torch.Tensor:
    """The numbers of the last `num` batches, counted from 1: shape (num, 1), or () for one."""
    if num == 1:
        return count
    return (count - torch.arange(num - 1, -1, -1, device=count.device))[:, None]


@torch.no_grad()
def mabn_backward_slope(
    sum_dz: torch.Tensor,
    num_values: int | torch.Tensor,
    squared: torch.Tensor,
    weight: torch.Tensor | None,
    loss_scale: torch.Tensor | None,
    values: torch.Tensor,
    count: torch.Tensor,
    warmup_iters: int,
    lag: int = 0,
) -> torch.Tensor:
    """
    Takes notice of the statistic ψ of G batches, and tells which multiple of x MABN's gradient loses.

    Args:
        sum_dz: Σ d·r·z, shape (G, C), which with ψ_B = mean(d·γ·r·z) = γ·(Σ d·r·z)/n is all that is needed.
        num_values: n, values per channel: a number, or shape (G, 1).
        squared: χ̄² + ε, shape (G, C).
        weight: γ, shape (C,); None is 1.
        loss_scale: by which d is multiplied, one value; None is 1. The ring buffer is free of it.
        values, count: the ring buffer of ψ, changed in place.
        warmup_iters: the last iteration with ψ̄ = ψ_B.
        lag: that of :class:`MABN2d`.

    Returns:
        ψ̄ / (χ̄² + ε), shape (G, C).
    """
    kernels = triton_for(values) if len(sum_dz) == 1 else None
    if kernels is not None:
        return kernels.mabn_backward_slope(
            sum_dz, num_values, squared, weight, loss_scale, values, count, warmup_iters, lag
        )
    psi = (sum_dz if weight is None else sum_dz * weight) / num_values
    if loss_scale is not None:
        psi = psi / loss_scale
    psi = record_and_average(psi, values, count, warmup_iters, lag)
    if loss_scale is not None:
        psi = psi * loss_scale
    return psi / squared
