"""What a training step of a layer costs in launches: kernels, memsets and copies on the device."""

import pytest
import torch

from mabn_d2.layers import BRN2d, GhostBatchNorm2d, MABN2d, MBN2d, centralize_kernel
from mabn_d2.training import follow_grad_scaler

from . import record
from .conditions import LAYOUTS, every_layout, train_step

# Launches of forward and backward in float32, and under mixed precision with a `GradScaler`; `nn.BatchNorm2d`
# has 3. Lower a number when the code gets better.
BUDGETS = {
    "MABN": (lambda: MABN2d(8), 7, 8),
    "MABN with a lag": (lambda: MABN2d(8, lag=1), 6, 7),
    "MABN without Triton": (lambda: MABN2d(8), 39, 42),
    "BRN": (lambda: BRN2d(8), 33, 33),
    "MBN": (lambda: MBN2d(8), 36, 36),
    "BN": (lambda: GhostBatchNorm2d(8), 31, 31),
}
CENTRALIZATION = 4

STEPS = 3  # the first ones may set up what later ones use


@every_layout
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed precision"])
@pytest.mark.parametrize("norm", BUDGETS)
def test_a_norm_stays_within_its_budget(monkeypatch, norm, mixed, layout):
    make, *budgets = BUDGETS[norm]
    monkeypatch.setenv("MABN_D2_TRITON", "0" if "without" in norm else "1")
    module = make().cuda().train()
    dtype = torch.float16 if mixed else torch.float32
    x = torch.zeros(4, 8, 6, 6, device="cuda", dtype=dtype).contiguous(
        memory_format=LAYOUTS[layout]
    )
    x.requires_grad_()
    if mixed:
        scaler = torch.amp.GradScaler("cuda")
        scaler.scale(torch.zeros((), device="cuda"))  # on the device from its first use on
        follow_grad_scaler(module, scaler)
    for _ in range(STEPS):
        with record() as log, torch.autocast("cuda", enabled=mixed):
            train_step(module, x, x.detach())
    assert log.launches <= budgets[mixed], str(log)


def test_a_large_channels_last_input_costs_two_launches_more(monkeypatch):
    monkeypatch.setenv("MABN_D2_TRITON", "0")
    module = MABN2d(64).cuda().train()
    x = torch.zeros(2, 64, 200, 200, device="cuda").contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for _ in range(STEPS):
        with record() as log:
            train_step(module, x, x.detach())
    assert log.launches <= BUDGETS["MABN without Triton"][1] + 2, str(log)


def test_centralization_of_a_kernel_stays_within_its_budget():
    weight = torch.zeros(16, 8, 3, 3, device="cuda", requires_grad=True)
    for _ in range(STEPS):
        with record() as log:
            torch.autograd.grad(centralize_kernel(weight), weight, weight.detach())
    assert log.launches <= CENTRALIZATION, str(log)
