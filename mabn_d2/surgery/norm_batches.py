"""Which images a norm takes its statistics from."""

from torch import nn

from ..layers import GhostBatchNorm2d, Norm2d


def set_norm_batch_size(model: nn.Module, size: int) -> None:
    """
    Makes every norm of a model that has batch statistics take them from groups of images, in place.

    The norm sees its input as groups of `size` consecutive images, one after the other: the output,
    the gradients and the statistics are those of calling it on each group in turn, but computed in
    one pass. `nn.BatchNorm2d` becomes a `GhostBatchNorm2d`, with the same state dict. Norms without
    batch statistics are left alone.

    Args:
        size: images in a normalization batch; 0 stands for all images of the input.

    Raises:
        ValueError: the size is negative, or a norm's statistics span several workers.
    """
    if size < 0:
        raise ValueError(f"The normalization batch size must be a non-negative integer, got {size}")
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            if not module.track_running_stats or module.momentum is None:
                raise ValueError(f"{name}: needs running statistics with a momentum, is {module}")
            module.__class__ = GhostBatchNorm2d
        if isinstance(module, Norm2d):
            module.norm_batch_size = size
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which does not take its statistics from a "
                "group of one worker's images"
            )
