"""
The Triton kernels say what the plain functions say, and compile for GPUs that are not there.

The numbers are those of Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported.
"""

import os
import subprocess
import sys

import pytest
import torch

from mabn_d2 import ops
from mabn_d2.layers import MABN2d
from mabn_d2.ops import modes
from mabn_d2.ops.per_channel import as_product

triton = pytest.importorskip("triton")
from mabn_d2.ops import triton_passes as passes  # noqa: E402
from mabn_d2.ops import triton_vectors as kernels  # noqa: E402

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")


@compiled
@pytest.mark.skipif(
    triton.__version__.startswith("2."), reason="Triton 2's interpreter has no blocks of rows"
)
def test_the_kernels_numbers_are_those_of_the_plain_functions():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "...." in done.stdout, done.stdout


@pytest.fixture(autouse=True)
def loops_run_to_a_bound_that_is_an_argument(monkeypatch):
    """Triton's interpreter makes an `int` of an array with one element, which NumPy 2.4 refuses."""
    if not IS_INTERPRETED:
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope, *others):
        patch_tensor(tensor, scope, *others)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def close(actual, expected):
    largest = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * largest, equal_nan=True)


@interpreted
@pytest.mark.parametrize(
    "channels, size, affine, loss_scale, renormalizes, lag",
    [(6, 3, True, 65536.0, True, 0), (5, 2, True, None, True, 1),
     (6, 2, False, 65536.0, False, 0), (4, 1, False, None, True, 1)],
)  # fmt: skip
def test_through_warm_up_and_batches_that_are_not_finite(
    monkeypatch, channels, size, affine, loss_scale, renormalizes, lag
):
    monkeypatch.setattr(kernels, "BLOCK", 4)  # several blocks, the last one not full
    monkeypatch.setattr(kernels, "ROWS", 2)
    torch.manual_seed(0)
    weight = torch.randn(channels) if affine else None
    if affine:
        weight[:4] = torch.tensor([0.0, 1e-20, -1e-20, -1.0])
    loss_scale = None if loss_scale is None else torch.tensor(loss_scale)
    sides = []
    for functions in (ops, kernels):
        rings = [(torch.zeros(size, channels), torch.zeros((), dtype=torch.long)) for _ in "ab"]
        sides.append((functions, torch.ones(channels), *rings))
    for step in range(2 * size + 6):
        second_moment = torch.rand(1, channels) * 3 * (step + 1)
        sum_dz = torch.randn(1, channels) * 1000
        if step in (1, size + 4):  # in the warm-up and after it
            second_moment[0, step % 3] = float("nan") if step == 1 else float("inf")
            sum_dz[0, -1] = float("inf") if step == 1 else float("nan")
        results = []
        for functions, running_var, (moments, count), (psi, psi_count) in sides:
            unit, scale, squared = functions.mabn_forward_factors(
                second_moment.clone(), moments, count, running_var, weight, size + 1,
                size + 3 if renormalizes else None, 1.5, 0.1, 1e-5, lag,
            )  # fmt: skip
            slope = functions.mabn_backward_slope(
                sum_dz.clone(), 70, squared, weight, loss_scale, psi, psi_count, size + 1, lag
            )
            results.append([unit, scale, squared, slope, moments, running_var, psi])
            results[-1] += [count, psi_count]
        for expected, actual in zip(*results):
            close(actual, expected)
        for expected, actual in zip(
            as_product(scale[0], slope[0]), kernels.as_product(scale[0], slope[0])
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert count == psi_count == 2 * size + 4


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Scaler:
    """Of a `GradScaler`, the scale: it needs a GPU itself."""

    def scale(self, value):
        return value * 1024.0


def layer(lag, affine, shift):
    torch.manual_seed(1)
    norm = MABN2d(
        5, buffer_size=3, warmup_iters=2, renorm_start_iter=5, renorm_clip=1.3, lag=lag,
        momentum=0.3, affine=affine,
    ).train()  # fmt: skip
    if affine:
        torch.nn.init.uniform_(norm.weight, -1, 2)
        torch.nn.init.uniform_(norm.bias, -1, 1)
        with torch.no_grad():
            norm.weight[:2] = torch.tensor([0.0, 1e-20])
    norm.running_mean += torch.linspace(-1, 1, 5) * shift
    return norm


@interpreted
@pytest.mark.parametrize(
    "lag, affine, shift, scaler, layout, dtype",
    [
        (0, True, 1, None, "NCHW", torch.float32),
        (0, True, 1, None, "channels_last", torch.bfloat16),
        (0, False, 0, None, "NCHW", torch.float16),
        (0, False, 0, None, "channels_last", torch.float32),
        (1, True, 1, Scaler(), "NCHW", torch.float16),
        (1, True, 1, Scaler(), "channels_last", torch.float32),
        (1, False, 0, None, "NCHW", torch.bfloat16),
        (1, False, 0, None, "channels_last", torch.float16),
    ],
)
def test_a_layer_that_writes_before_all_is_known_has_the_plain_layers_numbers(
    monkeypatch, lag, affine, shift, scaler, layout, dtype
):
    # Several tiles in a program, several programs, the last ones not full.
    monkeypatch.setattr(passes, "TILES", {True: (8, 4), False: (16, 1)})
    monkeypatch.setattr(passes, "PROGRAMS", 10)
    monkeypatch.setattr(passes, "ROWS", 2)
    monkeypatch.setattr(kernels, "ROWS", 2)
    norms = [layer(lag, affine, shift) for _ in range(2)]
    for norm in norms:
        norm.grad_scaler = scaler
    torch.manual_seed(2)
    rewrite, how_many_differ = passes._rewrite, []

    class Counting:
        def __getitem__(self, grid):
            def start(x, d, out, differs, *others, **options):
                how_many_differ.append(differs.sum().item())
                return rewrite[grid](x, d, out, differs, *others, **options)

            return start

    monkeypatch.setattr(passes, "_rewrite", Counting())
    for step in range(12):
        x = torch.randn(2, 5, 3, 5 + step % 3)
        if step == 8:
            x[:, 1] *= 5  # r is clipped
        if step in (1, 5, 9):
            x[0, 2, 0, 0] = float("inf")
        x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
        d = torch.randn(x.shape).to(dtype)
        if step == 10:
            d[0, 0, 0, 0] = float("nan")
        results = []
        for norm, uses_triton in zip(norms, (False, True)):
            wants = [x.clone().requires_grad_()] + list(norm.parameters())
            with monkeypatch.context() as patch:
                if uses_triton:
                    patch.setattr(modes, "triton_for", lambda vector: kernels)
                out = norm(wants[0])
                gradients = torch.autograd.grad(out, wants, d)
            for tensor in (out, gradients[0]):
                assert tensor.dtype == dtype and tensor.stride() == x.stride()
            results.append([out, *gradients, *norm.buffers()])
        for expected, actual in zip(*results):
            expected, actual = expected.double(), actual.double()
            finite = expected[expected.isfinite()].abs()
            atol = TOLERANCE[dtype] * max(finite.max().item() if len(finite) else 0, 1)
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)
    every = 1 + lag  # the backward pass rewrites as well
    assert how_many_differ[::every] == [5] * 7 + ([0, 0, 1, 1, 1] if lag else [0, 1, 1, 1, 0])
    if lag:  # ψ is averaged from the fifth recorded one on
        assert how_many_differ[1::2] == [5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert not norms[1]._known and norms[1].psi.count == 8


TYPES = dict.fromkeys(["warmup_iters", "renorm_start_iter", "parts", "M", "C"], "i32")
TYPES |= dict.fromkeys(passes.SIZES, "i32")
TYPES |= dict.fromkeys(["least_ratio", "most_ratio", "momentum", "eps", "share"], "fp32")
TYPES |= {"count_pointer": "*i64", "differs": "*i8"}
MAPS = ["x", "d", "out", "grad_x"]
VECTOR_KERNELS = ["_forward_kernel", "_backward_kernel", "_product_kernel"]
PASSES = ["_forward_pass", "_backward_pass", "_rewrite"]

for_every_capability = pytest.mark.parametrize("capability", [70, 80, 90])


@compiled
@for_every_capability
@pytest.mark.parametrize("kernel", VECTOR_KERNELS)
@pytest.mark.parametrize("channels, size", [(64, 16), (300, 33)])
def test_every_kernel_for_vectors_compiles_for_gpus_that_are_not_there(
    monkeypatch, tmp_path, kernel, capability, channels, size
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = dict(C=channels, M=size, BLOCK=kernels.BLOCK, ROWS=kernels.ROWS)
    for flags in (True, False):
        constants |= dict.fromkeys(["HAS_WEIGHT", "HAS_SCALE", "RENORMALIZES", "LAG"], flags)
        compile_for(getattr(kernels, kernel), TYPES, constants, capability, monkeypatch)


@compiled
@for_every_capability
@pytest.mark.parametrize("kernel", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pass_compiles_for_gpus_that_are_not_there(
    monkeypatch, tmp_path, kernel, capability, layout
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    is_last = layout == "channels_last"
    constants = dict(zip(["VALUES", "CHANNELS"], passes.TILES[is_last]))
    constants |= dict(ROWS=passes.ROWS, CHANNELS_LAST=is_last)
    for flag, dtype in [(True, "*fp32"), (False, "*fp16"), (True, "*bf16"), (False, "*bf16")]:
        if dtype == "*bf16" and capability < 80:
            continue
        constants |= dict.fromkeys(["HAS_SCALE", "IS_BACKWARD"], flag)
        types = TYPES | dict.fromkeys(MAPS, dtype)
        compile_for(getattr(passes, kernel), types, constants, capability, monkeypatch)


def compile_for(function, types, constants, capability, monkeypatch):
    """Compiles a kernel; arguments without a type are pointers to float32."""
    from triton.compiler import ASTSource, compiler

    constants = {p.name: constants[p.name] for p in function.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in function.arg_names
    }
    if triton.__version__.startswith("2."):
        from triton.compiler.backends.cuda import CUDABackend

        # What starts a kernel is linked against a driver.
        monkeypatch.setattr(CUDABackend, "make_launcher_stub", lambda *args: "")
        monkeypatch.setattr(compiler, "CompiledKernel", lambda *args: args)
        place = function.arg_names.index
        source = ASTSource(
            function,
            {place(n): t for n, t in signature.items() if t != "constexpr"},
            {place(n): v for n, v in constants.items()},
        )
        triton.compile(source, target=("cuda", capability))
    else:
        from triton.backends.compiler import GPUTarget

        source = ASTSource(function, signature, constants)
        triton.compile(source, target=GPUTarget("cuda", capability, 32))
