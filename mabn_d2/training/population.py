"""Statistics of norms over many batches with fixed weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..layers.norm import Norm2d
from ..ops import channel_mean_var


class _PopulationMoments:
    """Mean and variance of everything that a norm has seen, combined batch by batch in float64."""

    def __init__(self, norm: Norm2d):
        self.count = 0
        self.mean = torch.zeros_like(norm.running_var, dtype=torch.float64)
        self.var = torch.zeros_like(self.mean)

    def __call__(self, norm: Norm2d, args) -> None:
        (x,) = args
        count = x.numel() // norm.num_features
        if count == 0:
            return
        mean, var = channel_mean_var(x.detach(), norm.running_var.dtype)
        share = count / (self.count + count)
        difference = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * difference.square())
        self.mean += share * difference
        self.count += count


@contextlib.contextmanager
@torch.no_grad()
def population_statistics(model: nn.Module) -> Iterator[None]:
    """
    Estimates the running statistics of every :class:`Norm2d` from the batches that are run in the block.

    Inside, the model runs in training mode with fixed weights. On leaving, the running statistics
    of a layer are the moments of everything that it has seen, and its other state is what it was.
    This is for our norms what `fvcore.nn.precise_bn` is for BN. Frozen layers are left alone.
    """
    norms = [m for m in model.modules() if isinstance(m, Norm2d) and m.training and not m.frozen]
    states = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
    moments = [_PopulationMoments(norm) for norm in norms]
    handles = []
    for norm, moment in zip(norms, moments):
        handles.append(norm.register_forward_pre_hook(moment))
        norm.renormalize = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, state in zip(norms, states):
            norm.load_state_dict(state)
            del norm.renormalize
    for norm, moment in zip(norms, moments):
        if not moment.count:
            continue
        norm.set_population_statistics(moment.mean, moment.var)
