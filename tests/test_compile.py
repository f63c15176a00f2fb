"""The norms under `torch.compile`, which needs a C++ compiler on the CPU."""

import copy
import shutil
import sys

import pytest
import torch
from torch import nn

from mabn_d2.layers import BRN2d, CenConv2d, MABN2d, MBN2d

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the newest stack's"),
]

# Past every warm-up at the third iteration.
NORMS = {
    "MABN": lambda: MABN2d(6, buffer_size=1, warmup_iters=0, renorm_start_iter=1),
    "BRN": lambda: BRN2d(6, r_max_iters=(0, 2), d_max_iters=(0, 2)),
    "MBN": lambda: MBN2d(6, memory_size=2),
}
PLACES = {
    "alone": lambda norm: norm,
    "behind": lambda norm: nn.Sequential(CenConv2d(6, 6, 3), norm, nn.ReLU()),
    "inside": lambda norm: CenConv2d(6, 6, 3, norm=norm, activation=torch.relu),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", PLACES)
def test_a_compiled_norm_computes_the_same_for_sizes_that_change(norm, place):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = PLACES[place](NORMS[norm]()).train()
    twin = copy.deepcopy(plain)
    # With torch 2.11, inductor fails for an nn.Conv2d by itself whose input changes its size.
    dynamic = None if norm == "MABN" or place == "alone" else False
    compiled = torch.compile(twin, fullgraph=True, dynamic=dynamic)
    for width in (8, 9, 8):
        x = torch.randn(2, 6, 8, width)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [plain(inputs[0]), compiled(inputs[1])]
        d = torch.randn_like(outputs[0])
        for out in outputs:
            out.backward(d)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(twin.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(twin.buffers(), plain.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain.eval(), twin.eval()
    compiled = torch.compile(twin, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_that_is_not_finite_is_not_recorded_by_a_compiled_norm(norm):
    torch._dynamo.reset()
    module = NORMS[norm]().train()
    compiled = torch.compile(module)
    compiled(torch.randn(2, 6, 4, 4))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    compiled(torch.full((2, 6, 4, 4), float("inf")))
    moves = {"num_batches_tracked"} | ({"running_var"} if norm == "MABN" else set())
    for key, value in module.state_dict().items():
        assert value.isfinite().all(), key
        if key not in moves:
            torch.testing.assert_close(value, before[key], msg=key)


@pytest.mark.parametrize("norm", NORMS)
def test_there_are_no_graph_breaks(norm):
    torch._dynamo.reset()
    module = PLACES["inside"](NORMS[norm]()).train()
    x = torch.randn(2, 6, 8, 8)
    assert torch._dynamo.explain(module)(x).graph_break_count == 0
    assert torch._dynamo.explain(module.eval())(x).graph_break_count == 0
