"""
The norms' code for CUDA in every condition: what comes out, in which layout, and that nobody waits.

The second test has the results computed, and compares with the same norm on the CPU.
"""

import copy

import pytest
import torch
from torch import nn

from . import compute, record
from .conditions import (
    LAYOUTS,
    autocast,
    build,
    build_input,
    every_dtype,
    every_extent,
    every_layout,
    every_norm,
    every_norm_batch_size,
    to_device,
    train_step,
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

with_and_without_gradient = pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])


@every_norm
@every_norm_batch_size
@every_extent
@every_layout
@every_dtype
@with_and_without_gradient
def test_output_and_gradient_have_the_inputs_dtype_and_layout_and_nobody_waits(
    norm, norm_batch_size, extent, layout, dtype, needs_x
):
    module = build(norm, norm_batch_size).cuda()
    x = to_device(build_input(extent, dtype, layout))

    def keeps_layout(tensor):  # where the input has gaps, any layout without gaps will do
        forms = [LAYOUTS[layout]] if extent in ("full", "1x1") else LAYOUTS.values()
        return any(tensor.is_contiguous(memory_format=form) for form in forms)

    for layout_of_d in LAYOUTS.values():
        d = torch.zeros(x.shape, dtype=x.dtype, device="cuda").contiguous(memory_format=layout_of_d)
        for _ in range(2):  # the first step may set up what later ones use
            with record(stacks=True) as log, autocast(dtype):
                out, *gradients = train_step(module, x.detach().requires_grad_(needs_x), d)
        assert not log.waits()
        grad_x, grad_weight, grad_bias = gradients
        for tensor in (out, grad_x) if needs_x else (out,):
            assert tensor.dtype == x.dtype and tensor.shape == x.shape and keeps_layout(tensor)
        assert grad_weight.dtype == grad_bias.dtype == module.running_var.dtype == torch.float32
    with record(stacks=True) as log, torch.no_grad():
        out = module.eval()(x)
    assert not log.waits()
    assert out.dtype == x.dtype and keeps_layout(out)


@every_norm
@every_norm_batch_size
def test_nobody_waits_under_deterministic_algorithms(norm, norm_batch_size):
    module, x = build(norm, norm_batch_size).cuda(), build_input("full").cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            with record(stacks=True) as log:
                train_step(module, x, x.detach())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not log.waits()


@every_norm
@every_norm_batch_size
@every_extent
@every_layout
@every_dtype
@with_and_without_gradient
def test_values_are_those_of_the_cpu(norm, norm_batch_size, extent, layout, dtype, needs_x):
    on_cpu = build(norm, norm_batch_size)
    nn.init.uniform_(on_cpu.weight, -1, 2)
    nn.init.uniform_(on_cpu.running_mean)  # of MABN an imported shift
    tolerance = dict.fromkeys(("rtol", "atol"), TOLERANCE[build_input(extent, dtype).dtype])
    with compute():
        on_device = copy.deepcopy(on_cpu).cuda()
        for step in range(4):
            if step == 3:  # γ of a channel is 0 where its ψ is not
                on_cpu.weight.data[0] = on_device.weight.data[0] = 0
            x = build_input(extent, dtype, layout)
            d = torch.randn(x.shape).to(x.dtype)
            expected = train_step(on_cpu, x.detach().requires_grad_(needs_x), d)
            with autocast(dtype):
                found = train_step(on_device, to_device(x).requires_grad_(needs_x), d.to("cuda"))
            for a, b in zip(found, expected):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a.cpu(), b, **tolerance)
            for (name, a), b in zip(on_device.named_buffers(), on_cpu.buffers()):
                torch.testing.assert_close(a.cpu(), b, msg=name, **tolerance)
