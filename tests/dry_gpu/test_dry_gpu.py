"""The dry GPU itself: what the other tests of this folder rely on."""

import pytest
import torch
from torch import nn

from . import compute, record
from .computing import host_view
from .conditions import CHANNELS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    y = tl.load(y_ptr + offsets, mask=offsets < size)
    tl.store(out_ptr + offsets, x + y, mask=offsets < size)


@pytest.mark.parametrize("num_ctas", [1, 2])
def test_a_triton_kernel_is_compiled_and_its_launch_recorded(num_ctas):
    x = torch.zeros(1000, device="cuda")
    with record(stacks=True) as log:
        out = torch.empty_like(x)
        add_kernel[(4,)](x, x, out, x.numel(), BLOCK=256, num_ctas=num_ctas)
    (event,) = log.events
    assert event.is_launch and event.name.startswith("add_kernel")
    assert event.grid == f"{4 * num_ctas},1,1" and event.author == __file__


def test_a_triton_kernel_takes_no_memory_of_the_host():
    x = torch.zeros(1000, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add_kernel[(4,)](x, torch.zeros(1000), x, x.numel(), BLOCK=256)


def test_launches_waits_and_copies_are_told_apart():
    x = torch.zeros(8, device="cuda")
    with record(stacks=True) as log:
        y = x + 1
        y.zero_()
        y.clone()
        y.sum().item()
    assert len(log.kernels) == 3 and log.launches == 4  # the clone is a copy on the device
    assert log.copies == [("D2H", 4)] and log.syncs == ["cudaStreamSynchronize"]
    assert len(log.waits()) == 2 and all("test_launches_waits" in line for line in log.waits())
    assert log.within(__file__).events == log.events and not log.within("mabn_d2/").events


def test_a_step_of_bn_is_three_launches():
    module, x = nn.BatchNorm2d(CHANNELS).cuda(), torch.zeros(4, CHANNELS, 6, 6, device="cuda")
    x.requires_grad_()
    with record() as log:
        torch.autograd.grad(module(x), x, x.detach())
    assert log.launches == 3, str(log)  # one counts the batches
    names = ["cudnnBatchNormalizationForwardTrainingEx", "cudnnBatchNormalizationBackwardEx"]
    assert [name for name in log.kernels if name.startswith("cudnn")] == names


def test_results_are_computed_on_request():
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
    with compute():
        y = nn.functional.conv2d(x.cuda(), kernel.cuda()).relu()
        selected = y[y > 1]
        assert selected.is_cuda and len(selected) == (y > 1).sum().item()
        repeated = torch.tensor([7], device="cuda").repeat_interleave(torch.tensor([512]).cuda())
        assert repeated.tolist() == [7] * 512
        y = y.cpu()
    torch.testing.assert_close(y, nn.functional.conv2d(x, kernel).relu())


def test_results_in_float64_have_its_precision():
    x = torch.randn(4, CHANNELS, 3, 5, dtype=torch.float64) + 3
    expected = nn.functional.batch_norm(x, None, None, training=True)
    with compute():
        mean, inv_std = torch.batch_norm_stats(x.cuda(), 1e-5)
        out = torch.batch_norm_elemt(x.cuda(), None, None, mean, inv_std, 1e-5)
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-12)


def test_results_without_maps_leave_feature_maps_at_zero_and_take_no_memory_of_the_host():
    with compute(maps=False):
        x = torch.ones(1, 256, 64, 64, device="cuda")
        boxes = torch.arange(4.0, device="cuda") + x.sum()
        assert boxes.tolist() == [0, 1, 2, 3] and not host_view(x).any()


def test_memory_is_counted_by_pytorchs_allocator():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1 << 28, device="cuda")
    y = x + 1
    del x, y
    assert torch.cuda.max_memory_allocated() - before == 2 << 30
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 40, device="cuda")
