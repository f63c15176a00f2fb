"""What the norms compute, under names that say so: PyTorch's operators and their counterparts."""

from .modes import constant, triton_passes_for
from .moving_average import (
    ForwardFactors,
    Recorded,
    exponential_averages,
    mabn_backward_slope,
    mabn_forward_factors,
    record,
    record_and_average,
    record_one,
)
from .per_channel import (
    add_affine_,
    affine_map,
    affine_map_backward,
    channel_mean_var,
    gradient_sums,
    normalization_backward,
    second_moment_about,
)

__all__ = [
    "ForwardFactors",
    "Recorded",
    "add_affine_",
    "affine_map",
    "affine_map_backward",
    "channel_mean_var",
    "constant",
    "exponential_averages",
    "gradient_sums",
    "mabn_backward_slope",
    "mabn_forward_factors",
    "normalization_backward",
    "record",
    "record_and_average",
    "record_one",
    "second_moment_about",
    "triton_passes_for",
]
