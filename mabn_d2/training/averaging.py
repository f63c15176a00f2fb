"""The statistics of norms, averaged over workers."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..layers import Norm2d

_NORMS_WITH_STATISTICS = (Norm2d, nn.modules.batchnorm._BatchNorm)


def norms_with_statistics(model: nn.Module) -> list[nn.Module]:
    """The norms of a model that gather statistics in training."""
    return [module for module in model.modules() if isinstance(module, _NORMS_WITH_STATISTICS)]


def norm_statistics(model: nn.Module) -> Iterator[torch.Tensor]:
    """The statistics that norms gather in training, as the tensors of the model itself."""
    for norm in norms_with_statistics(model):
        yield from norm.buffers()


@torch.no_grad()
def average_norm_statistics(model: nn.Module) -> None:
    """
    Replaces the statistics of all norms by their mean over all workers, in place.

    Every worker calls this; afterwards the statistics agree to the bit. Counts of recorded batches,
    which differ where a worker had an empty input, become the smallest of all workers, so that no
    worker takes an entry of a moving average for recorded that another worker lacks.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    statistics = list(norm_statistics(model))
    if world_size == 1 or not statistics:
        return
    values = [s for s in statistics if s.is_floating_point()]
    counts = [s for s in statistics if not s.is_floating_point()]
    for tensors, reduction, dtype in [
        (values, dist.ReduceOp.SUM, torch.float64),
        (counts, dist.ReduceOp.MIN, torch.int64),
    ]:
        flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
        dist.all_reduce(flat, reduction)
        if reduction == dist.ReduceOp.SUM:
            flat /= world_size
        for tensor, reduced in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(reduced.view_as(tensor))
