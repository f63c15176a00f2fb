"""Stage `correct`: the norms on the GPU give the numbers of the same norms in float64 on the CPU."""

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from ...layers import BRN2d, CenConv2d, GhostBatchNorm2d, MABN2d, MBN2d
from ..measure import MEMORY_FORMATS, in_groups
from .stage import Case, Options, Stage

# Past every warm-up at the third of STEPS. A name with a number: normalization batches of that many images.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "MABN": lambda channels: MABN2d(channels, buffer_size=2, warmup_iters=0, renorm_start_iter=0),
    "BRN": lambda channels: BRN2d(channels, r_max_iters=(0, 2), d_max_iters=(0, 2)),
    "MBN": lambda channels: MBN2d(channels, memory_size=2),
}
NORMS |= {f"{name}(4)": in_groups(norm, 4) for name, norm in NORMS.items()}
NORMS["BN(4)"] = in_groups(GhostBatchNorm2d, 4)
STEPS = 4
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float16,
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXTENTS = ("full", "1x1", "empty", "sliced", "expanded")
# Of 1100 iterations, of which each depends on those before.
TRACE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
TRITON = "MABN_D2_TRITON"


@contextlib.contextmanager
def triton(switch: str) -> Iterator[None]:
    """With "off", the block runs without the package's kernels in Triton."""
    before = os.environ.get(TRITON)
    os.environ[TRITON] = "0" if switch == "off" else "1"
    try:
        yield
    finally:
        os.environ.pop(TRITON)
        if before is not None:
            os.environ[TRITON] = before


def triton_switches() -> list[str]:
    """What to measure: both, or where the environment turns Triton off, without it."""
    return ["off"] if os.environ.get(TRITON) == "0" else ["on", "off"]


def cases(options: Options) -> list[Case]:
    def case(check, norm, dtype, switch):
        return {"check": check, "norm": norm, "dtype": dtype, "triton": switch}

    switches = triton_switches()
    trace = [case("trace", "MABN", dtype, s) for dtype in TRACE_TOLERANCE for s in switches]
    norms = ["MABN", "BN(4)"] if options.tiny else list(NORMS)
    # Only MABN has kernels in Triton.
    return trace + [
        case("norm", norm, dtype, switch)
        for dtype, norm in itertools.product(DTYPES, norms)
        for switch in (switches if norm.startswith("MABN") else ["off"])
    ]


def measure(case: Case, options: Options) -> Iterator[dict]:
    torch.backends.cudnn.allow_tf32 = False
    with triton(case["triton"]):
        if case["check"] == "trace":
            path = options.root / "tests" / "data" / "mabn_reference_trace.npz"
            last_step = 20 if options.tiny else 1100
            yield compare_with_trace(dict(np.load(path)), case["dtype"], last_step)
            return
        size = (8, 8, 6, 5) if options.tiny else (8, 64, 48, 40)
        for layout, extent in itertools.product(MEMORY_FORMATS, EXTENTS):
            yield {
                "layout": layout,
                "extent": extent,
                **compare_norm(case["norm"], case["dtype"], layout, extent, size),
            }


class Errors:
    """
    The largest errors of output, gradients and state, relative to the largest value of a tensor.

    Or to 1, the size of what comes in, where that is smaller: a gradient over few values is what is left
    of them after they cancel.
    """

    def __init__(self, tolerance: float):
        self._tolerance = tolerance
        self._largest = {"output": 0.0, "gradient": 0.0, "state": 0.0}

    def compare(self, kind: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        if found.shape != expected.shape:
            raise AssertionError(f"{kind}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        if expected.numel():
            scale = expected.abs().max().clamp(min=1)
            error = ((found - expected).abs().max() / scale).item()
            # NaN must not get lost: it is larger than nothing.
            self._largest[kind] = max(self._largest[kind], error if error == error else np.inf)

    def row(self) -> dict:
        ok = max(self._largest.values()) <= self._tolerance
        return {
            **{f"{kind}_error": error for kind, error in self._largest.items()},
            "tolerance": self._tolerance,
            "ok": "yes" if ok else "no",
        }


def compare_norm(
    name: str, dtype: str, layout: str, extent: str, size: tuple[int, int, int, int]
) -> dict:
    """Trains the norm for a few steps on the GPU and in float64 on the CPU, on the same values."""
    torch.manual_seed(0)
    expected = NORMS[name](size[1]).train()
    nn.init.uniform_(expected.weight, -1, 2)
    found = copy.deepcopy(expected).cuda()
    expected.double()
    errors = Errors(TOLERANCE[DTYPES[dtype]])
    for _ in range(STEPS):
        x = build_input(extent, size, DTYPES[dtype], MEMORY_FORMATS[layout])
        d = torch.randn(x.shape).to(x.dtype)
        with torch.autocast("cuda", enabled=dtype == "autocast"):
            out, *gradients = train_step(found, on_device(x), d.cuda())
        if out.dtype != x.dtype or gradients[0].dtype != x.dtype:
            raise AssertionError(f"{out.dtype} and gradient {gradients[0].dtype} from {x.dtype}")
        expected_out, *expected_gradients = train_step(expected, x.double(), d.double())
        errors.compare("output", out, expected_out)
        for a, b in zip(gradients, expected_gradients):
            errors.compare("gradient", a, b)
        for a, b in zip(found.buffers(), expected.buffers()):
            errors.compare("state", a, b)
    with torch.no_grad():
        errors.compare("output", found.eval()(on_device(x)), expected.eval()(x.double()))
    return errors.row()


def train_step(norm: nn.Module, x: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    out = norm(x)
    return out, *torch.autograd.grad(out, (x, norm.weight, norm.bias), d)


def build_input(extent, size, dtype, memory_format) -> torch.Tensor:
    """A random input on the CPU."""
    n, c, h, w = size
    if extent == "empty":
        n = 0
    elif extent == "1x1":
        h = w = 1
    elif extent == "expanded":
        n = 1
    elif extent == "sliced":
        c, h = c + 3, 2 * h
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=memory_format)
    if extent == "sliced":
        return x[:, 2:-1, ::2]
    return x.expand(size[0], -1, -1, -1) if extent == "expanded" else x


def on_device(x: torch.Tensor) -> torch.Tensor:
    """x on the GPU with its strides, which `.cuda()` does not keep where there are gaps."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    return torch.as_strided(x, (extent,), (1,)).cuda().as_strided(x.shape, x.stride())


def compare_with_trace(trace: dict[str, np.ndarray], dtype: str, last_step: int) -> dict:
    """The authors' released layer and convolution, recorded in float64."""
    errors = Errors(TRACE_TOLERANCE[dtype])
    like = {"device": "cuda", "dtype": getattr(torch, dtype)}
    norm = MABN2d(6, **like)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(trace["weight"]))
        norm.bias.copy_(torch.from_numpy(trace["bias"]))
    steps = set(trace["steps"].tolist())
    for t in range(1, last_step + 1):
        r = np.random.RandomState(1000 + t)
        scale = np.exp(0.6 * np.sin(t / 37.0 + np.arange(6))) * (1 + 0.3 * np.arange(6))
        x = r.standard_normal((2, 6, 5, 7)) * scale[None, :, None, None] + 0.2 * np.cos(t / 11.0)
        d = r.standard_normal((2, 6, 5, 7)) * 0.1
        out, grad_x, grad_weight, grad_bias = train_step(
            norm, torch.from_numpy(x).to(**like), torch.from_numpy(d).to(**like)
        )
        if t not in steps:
            continue
        for kind, name, value in [
            ("output", "y", out),
            ("gradient", "gx", grad_x),
            ("gradient", "gw", grad_weight),
            ("gradient", "gb", grad_bias),
            ("state", "running_var", norm.running_var),
            ("state", "buffer_x2_mean", norm.second_moment.values.mean(0)),
            ("state", "buffer_gz_mean", norm.psi.values.mean(0)),
        ]:
            errors.compare(kind, value, torch.from_numpy(trace[f"{t}/{name}"]).view_as(value))
    if last_step == max(steps):
        out = norm.eval()(torch.from_numpy(trace["eval/x"]).to(**like))
        errors.compare("output", out, torch.from_numpy(trace["eval/y"]))
    for name, kwargs in [
        ("conv", dict(padding=1)),
        ("grouped", dict(padding=1, groups=2)),
        ("strided", dict(stride=2)),
    ]:
        conv = CenConv2d(4, 8, 3, bias=False, **like, **kwargs)
        conv.weight.data.copy_(torch.from_numpy(trace[f"{name}/w"]))
        x = torch.from_numpy(trace[f"{name}/x"]).to(**like).requires_grad_()
        out = conv(x)
        out.backward(torch.from_numpy(trace[f"{name}/gy"]).to(**like))
        for kind, key, value in [
            ("output", "y", out),
            ("gradient", "gx", x.grad),
            ("gradient", "gw", conv.weight.grad),
        ]:
            errors.compare(kind, value, torch.from_numpy(trace[f"{name}/{key}"]))
    return errors.row()


FILE = "correct.csv"
KEYS = ("check", "norm", "dtype", "triton")
VALUES = ("layout", "extent", "output_error", "gradient_error", "state_error", "tolerance", "ok")
STAGE = Stage("correct", FILE, KEYS, VALUES, cases, measure)
