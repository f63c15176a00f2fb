"""The study's norms on CUDA: they train, and nobody waits."""

import pytest
import torch

from mabn_d2.layers import CenConv2d

from . import record
from .conditions import CHANNELS  # skips without a dry GPU

from ..helpers.ablations import ABLATIONS  # isort: skip


@pytest.mark.parametrize("norm_batch_size", [0, 2])
@pytest.mark.parametrize("name", ABLATIONS)
def test_a_step_runs_and_nobody_waits(name, norm_batch_size):
    norm = ABLATIONS[name](CHANNELS)
    norm.norm_batch_size = norm_batch_size
    module = CenConv2d(3, CHANNELS, 3, bias=False, norm=norm).cuda()
    x = torch.zeros(4, 3, 8, 8, device="cuda")
    for _ in range(2):  # the first step may set up what the second uses
        with record(stacks=True) as log:
            out = module(x)
            torch.autograd.grad(out, list(module.parameters()), torch.zeros_like(out))
    assert out.shape == (4, CHANNELS, 6, 6)
    assert not log.waits()
