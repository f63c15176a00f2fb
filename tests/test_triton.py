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
from mabn_d2.ops.per_channel import as_product

triton = pytest.importorskip("triton")
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


POINTERS = {"count_pointer": "*i64"}
NUMBERS = {"warmup_iters": "i32", "renorm_start_iter": "i32"}
NUMBERS |= dict.fromkeys(["least_ratio", "most_ratio", "momentum", "eps", "share"], "fp32")
KERNELS = ["_forward_kernel", "_backward_kernel", "_product_kernel"]


@compiled
@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels, size", [(64, 16), (300, 33)])
def test_every_kernel_compiles_for_gpus_that_are_not_there(
    monkeypatch, tmp_path, kernel, capability, channels, size
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels, kernel)
    constants = dict(C=channels, M=size, BLOCK=kernels.BLOCK, ROWS=kernels.ROWS)
    for flags in (True, False):
        constants |= dict.fromkeys(["HAS_WEIGHT", "HAS_SCALE", "RENORMALIZES", "LAG"], flags)
        signature, given = {}, {}
        for name in function.arg_names:
            if name in constants:
                given[name] = constants[name]
            signature[name] = (
                "constexpr" if name in constants
                else NUMBERS.get(name) or POINTERS.get(name, "*fp32")
            )  # fmt: skip
        compile_for(function, signature, given, capability, monkeypatch)


def compile_for(function, signature, constants, capability, monkeypatch):
    from triton.compiler import ASTSource, compiler

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
