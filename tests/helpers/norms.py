"""One training step of a norm, and comparisons of its state and results."""

import torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {
    # dtype: bound of the error in units of the largest value, from the dtype's rounding
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def train(norm, x, d=None):
    """One forward and backward; returns the output and the input's gradient."""
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(torch.ones_like(y) if d is None else d)
    return y.detach(), x.grad


def state(norm):
    return {key: value.clone() for key, value in norm.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def as_layout(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x
