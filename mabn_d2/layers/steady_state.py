"""Norms whose moving averages and memories are those of a training that has run for long."""

import torch
from torch import nn

from .brn import BRN2d
from .mabn import MABN2d
from .mbn import MBN2d


@torch.no_grad()
def start_in_steady_state(norm: nn.Module) -> None:
    """Fills the memory of a norm as if the batches so far all had its running statistics."""
    if isinstance(norm, MABN2d):
        norm.second_moment.values.copy_(norm.running_var.expand_as(norm.second_moment.values))
        norm.psi.values.zero_()
        for ring in (norm.second_moment, norm.psi):
            ring.count.fill_(max(norm.warmup_iters, ring.size, norm.renorm_start_iter) + 1)
    elif isinstance(norm, BRN2d):
        norm.num_batches_tracked.fill_(max(norm.r_max_iters[1], norm.d_max_iters[1]))
    elif isinstance(norm, MBN2d):
        statistics = torch.stack([norm.running_mean, norm.running_var])
        norm.memory.values.copy_(statistics.expand_as(norm.memory.values))
        norm.memory.count.fill_(norm.memory.size)
