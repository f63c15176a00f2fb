"""What the tests of this folder share: a norm, an input, a training step. Skips them without a dry GPU."""

import contextlib

import pytest
import torch
from torch import nn

from mabn_d2.layers import BRN2d, GhostBatchNorm2d, MABN2d, MBN2d

from . import is_active

if not is_active():
    pytest.skip(
        "needs the dry GPU: make test-dry-gpu, or python -m tests.dry_gpu test",
        allow_module_level=True,
    )

CHANNELS = 8
# Past every warm-up at the third iteration.
NORMS = {
    "MABN": lambda: MABN2d(CHANNELS, buffer_size=2, warmup_iters=0, renorm_start_iter=0),
    "MABN, LAG 1": lambda: MABN2d(
        CHANNELS, buffer_size=2, warmup_iters=0, renorm_start_iter=0, lag=1
    ),
    "BRN": lambda: BRN2d(CHANNELS, r_max_iters=(0, 2), d_max_iters=(0, 2)),
    "MBN": lambda: MBN2d(CHANNELS, memory_size=2),
    "BN": lambda: GhostBatchNorm2d(CHANNELS),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float16,
}
EXTENTS = ["full", "1x1", "empty", "sliced", "expanded"]

every_norm = pytest.mark.parametrize("norm", NORMS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_extent = pytest.mark.parametrize("extent", EXTENTS)
every_norm_batch_size = pytest.mark.parametrize("norm_batch_size", [0, 2, 3])


def build(norm: str, norm_batch_size: int = 0) -> nn.Module:
    """A norm on the CPU, in training."""
    module = NORMS[norm]().train()
    module.norm_batch_size = norm_batch_size
    return module


def build_input(extent: str, dtype: str = "float32", layout: str = "NCHW") -> torch.Tensor:
    """A random input on the CPU, shape (N, CHANNELS, H, W)."""
    images, size = (0 if extent == "empty" else 4), (1 if extent == "1x1" else 6)
    if extent == "expanded":
        images = 1
    if extent == "sliced":
        x = torch.randn(images, CHANNELS + 3, 2 * size, size)
    else:
        x = torch.randn(images, CHANNELS, size, size)
    x = x.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    if extent == "sliced":
        return x[:, 2:-1, ::2]
    return x.expand(4, -1, -1, -1) if extent == "expanded" else x


def to_device(x: torch.Tensor) -> torch.Tensor:
    """The input on the device with its strides, which `.cuda()` does not keep where there are gaps."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    memory = torch.as_strided(x, (size,), (1,)).cuda()
    return memory.as_strided(x.shape, x.stride())


def autocast(dtype: str):
    return torch.autocast("cuda") if dtype == "autocast" else contextlib.nullcontext()


def train_step(module: nn.Module, x: torch.Tensor, d: torch.Tensor):
    """
    Forward and backward.

    Returns:
        the output, then the gradients of x (None where it needs none), weight and bias, as the norm
        returns them: what accumulates in `x.grad` may have been brought to another layout.
    """
    out = module(x)
    wanted = [t for t in (x, module.weight, module.bias) if t.requires_grad]
    gradients = torch.autograd.grad(out, wanted, d)
    return out, *([None] * (3 - len(wanted))), *gradients
