"""The recorder of batch statistics on CUDA: nobody waits before its one transfer."""

import pytest
import torch
from torch import nn

from mabn_d2.layers import MABN2d
from mabn_d2.statistics import StatisticsRecorder

from . import record
from .conditions import build_input, every_dtype, every_layout


@every_dtype
@every_layout
@pytest.mark.parametrize("norm", [MABN2d, nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
def test_recording_waits_for_one_transfer_only(norm, dtype, layout):
    x = build_input("full", dtype, layout).cuda()
    model = nn.Sequential(norm(x.shape[1]), nn.Identity()).cuda()
    if x.dtype != torch.float32:
        model[0].to(x.dtype)
    recorder = StatisticsRecorder(model)
    for _ in range(2):  # the first step may set up what later ones use
        with record(stacks=True) as log:
            model(x.requires_grad_()).sum().backward()
            recorder.step()
    assert not log.waits()
    with record() as log:
        assert recorder.flush()
    assert len(log.copies) == 1
