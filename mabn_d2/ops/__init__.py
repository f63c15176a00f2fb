"""What the norms compute, under names that say so: PyTorch's operators and their counterparts."""

from .per_channel import add_affine_, channel_mean_var, second_moment_about

__all__ = ["add_affine_", "channel_mean_var", "second_moment_about"]
