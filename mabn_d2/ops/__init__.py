"""What the norms compute, under names that say so: PyTorch's operators and their counterparts."""

from .per_channel import add_affine_, channel_dot, channel_mean_var

__all__ = ["add_affine_", "channel_dot", "channel_mean_var"]
