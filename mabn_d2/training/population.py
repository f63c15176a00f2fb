"""Statistics of norms over many batches with fixed weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.norm import Norm2d
from ..ops import channel_mean_var
from .recording import no_recording


class _PopulationMoments:
    """Mean and variance of everything that a norm has seen, combined batch by batch in float64."""

    def __init__(self, norm: nn.Module):
        self.count = 0
        self.mean = torch.zeros_like(norm.running_var, dtype=torch.float64)
        self.var = torch.zeros_like(self.mean)

    def __call__(self, norm: nn.Module, args) -> None:
        (x,) = args
        count = x.numel() // norm.num_features
        if count == 0:
            return
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        mean, var = channel_mean_var(x.detach(), dtype)
        share = count / (self.count + count)
        difference = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * difference.square())
        self.mean += share * difference
        self.count += count

    def add_workers(self) -> None:
        """Combines the moments of all workers, weighted with what each has seen."""
        sums = torch.stack([torch.ones_like(self.mean), self.mean, self.var + self.mean.square()])
        sums *= self.count
        dist.all_reduce(sums)
        self.count = int(sums[0, 0])
        self.mean = sums[1] / max(self.count, 1)
        self.var = (sums[2] / max(self.count, 1) - self.mean.square()).clamp(min=0)


def gathers_statistics(module: nn.Module) -> bool:
    """Whether a forward pass would move running statistics of the module."""
    if not isinstance(module, (Norm2d, _BatchNorm)) or module.running_var is None:
        return False
    return module.training and not getattr(module, "frozen", False)


@contextlib.contextmanager
@torch.no_grad()
def population_statistics(model: nn.Module) -> Iterator[None]:
    """
    Estimates the running statistics of all norms, PyTorch's BN too, from the batches that are run in the block.

    Inside, the model runs in training mode with fixed weights. On leaving, the running statistics
    of a layer are the moments of everything that it has seen, and all other buffers of the model are
    what they were. An empty input counts for nothing, and a layer that has seen no other keeps
    its statistics, as frozen layers and those in evaluation do. Several workers estimate each
    their own; see :func:`average_norm_statistics`.

    Raises:
        whatever the block raises; nothing has changed then.
    """
    norms = [module for module in model.modules() if gathers_statistics(module)]
    moments = [_PopulationMoments(norm) for norm in norms]
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_recording(model))
        for norm, moment in zip(norms, moments):
            stack.callback(norm.register_forward_pre_hook(moment).remove)
            if isinstance(norm, Norm2d):
                norm.renormalize = False
                stack.callback(delattr, norm, "renormalize")
        yield
    for norm, moment in zip(norms, moments):
        if moment.count and isinstance(norm, Norm2d):
            norm.set_population_statistics(moment.mean, moment.var)
        elif moment.count:
            norm.running_mean.copy_(moment.mean)
            norm.running_var.copy_(moment.var)


@contextlib.contextmanager
def input_moments(
    norms: Mapping[str, nn.Module],
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """
    The moments of what norms are called with in the block, over all workers.

    Args:
        norms: name -> norm with `num_features` and `running_var`; it is not changed.

    Yields:
        a dictionary that is filled on leaving: name -> mean and biased variance, float64, shape (C,).
        A norm that saw no value is not in it.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    moments = {name: _PopulationMoments(norm) for name, norm in norms.items()}
    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(moments[name]).remove)
        yield found
    for name, moment in moments.items():
        if dist.is_available() and dist.is_initialized():
            moment.add_workers()
        if moment.count:
            found[name] = moment.mean, moment.var
