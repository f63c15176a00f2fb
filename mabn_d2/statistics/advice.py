"""What the noise of batch statistics says about the norm to train with."""

import math
from typing import NamedTuple

import torch

from .diagnosis import Diagnosis

_RESAMPLES = 1000


class Thresholds(NamedTuple):
    """
    Up to which noise a norm is advised, see :func:`model_noise`.

    Attributes:
        noise: the largest with which BN is fine.
        between: the largest between images with which MABN is advised. Moving averages take noise out of
            the statistics, but leave in the activations what sets an image apart; GN takes that out.
        source: what they are derived from.
    """

    noise: float
    between: float
    source: str


# THE thresholds of the advice. Whoever derives them from other runs changes this entry and its source.
THRESHOLDS = Thresholds(
    noise=0.45,
    between=0.4,
    source="of a Mask R-CNN R26 from scratch, docs/statistics.md: over 2 images BN loses 2.7 box AP at a noise of 0.32, "
    "2.1 at 0.43, 9.5 at 0.47; GN is ahead of MABN at 0.40 between images",
)


class Advice(NamedTuple):
    """
    Attributes:
        norm: "BN", "MABN" or "GN".
        noise, between: of the model, see :func:`model_noise`.
        noise_interval, between_interval: in which 95 % of the resamples of the steps have them.
        certainty: share of the resamples with this advice.
        sync_workers: over how many workers SyncBN would have the noise with which BN is fine.
        thresholds: by which it was given.
        sentence: all of this in words.
    """

    norm: str
    noise: float
    noise_interval: tuple[float, float]
    between: float
    between_interval: tuple[float, float]
    certainty: float
    sync_workers: int
    thresholds: Thresholds
    sentence: str


def model_noise(diagnosis: Diagnosis, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The error that BN's statistics make in a model, the median over its layers, and its part between images.

        sqrt( mean² + (var / 2)² + grad_mean² + grad_dot² )

    The first two are to first order the error of Y, whose rms is 1, the last two that of the gradient that BN
    passes on, relative to rms(∂L/∂Y). A statistic that a layer does not have counts as 0.

    Args:
        weights: of the steps, shape (resamples, steps).

    Returns:
        two tensors of shape (resamples,).
    """
    factors = torch.tensor([1, 0.25, 1, 1], dtype=torch.float64)

    def over_layers(squares: list[torch.Tensor]) -> torch.Tensor:
        noises = []
        for of_layer in squares:
            count = (weights @ of_layer.isfinite().double()).clamp(min=1)
            mean = weights @ of_layer.nan_to_num() / count
            noises.append((mean @ factors).clamp(min=0).sqrt())
        return torch.stack(noises).median(0).values

    layers = diagnosis.layers
    noise = over_layers([layer.squared_errors for layer in layers])
    return noise, over_layers([layer.squared_common for layer in layers])


def advise(diagnosis: Diagnosis, thresholds: Thresholds = THRESHOLDS) -> Advice:
    """
    The norm that a model's noise speaks for, and how surely.

    Raises:
        ValueError: no norm of the model has seen anything.
    """
    if not diagnosis.layers:
        raise ValueError("No norm of the model was called with a 4-D input")
    steps = diagnosis.steps
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(steps, (_RESAMPLES, steps), generator=generator)
    weights = torch.zeros(_RESAMPLES + 1, steps, dtype=torch.float64)
    weights[0] = 1
    weights[1:].scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64))
    (noise, *noises), (between, *betweens) = (
        values.tolist() for values in model_noise(diagnosis, weights)
    )
    norm = _norm_for(noise, between, thresholds)
    same = [_norm_for(*pair, thresholds) == norm for pair in zip(noises, betweens)]
    certainty = sum(same) / _RESAMPLES
    intervals = _interval(noises), _interval(betweens)
    workers = max(1, math.ceil((noise / thresholds.noise) ** 2))
    advised = "BN is fine" if norm == "BN" else f"{norm} is advised"
    sync = "" if norm == "BN" else f", or SyncBN over {workers} workers"
    size = diagnosis.norm_batch
    sentence = (
        f"{advised if certainty >= 0.95 else f'Undecided, rather {norm}'}{sync}: over {size} "
        f"image{'s' * (size != 1)} the noise of BN's statistics is {noise:.3f} "
        f"({_text(intervals[0])}), between images {between:.3f} ({_text(intervals[1])}); of "
        f"{_RESAMPLES} resamples of the steps {certainty:.0%} lead to the same advice. Thresholds: BN up to "
        f"a noise of {thresholds.noise:g}, MABN up to {thresholds.between:g} between images, then GN "
        f"({thresholds.source})."
    )
    return Advice(
        norm, noise, intervals[0], between, intervals[1], certainty, workers, thresholds, sentence
    )


def _interval(values: list[float]) -> tuple[float, float]:
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(ends).tolist()
    return low, high


def _text(interval: tuple[float, float]) -> str:
    return f"95 %: {interval[0]:.3f} to {interval[1]:.3f}"


def _norm_for(noise: float, between: float, thresholds: Thresholds) -> str:
    if noise <= thresholds.noise:
        return "BN"
    return "MABN" if between <= thresholds.between else "GN"
