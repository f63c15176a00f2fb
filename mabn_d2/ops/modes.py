"""What runs around an operator decides which form of it is used."""

import functools
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _mode_stack


def is_eager() -> bool:
    """Whether operators run as they are called: nothing compiles them or handles them instead."""
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def _is_symbolic() -> bool:
    """Whether a mode of PyTorch's own handles operators, in which tensors may have no values."""
    return any(type(mode).__module__.startswith("torch.") for mode in _mode_stack())


_constants: dict[tuple, torch.Tensor] = {}


def constant(
    make: Callable[..., torch.Tensor], *args, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """
    make(*args, dtype=dtype, device=device), made once: on CUDA it is a launch or a copy. Not to be written to.

    Args:
        make: a factory such as `torch.zeros`.
    """
    if torch.compiler.is_compiling() or _is_symbolic():
        return make(*args, dtype=dtype, device=device)
    key = (make, args, dtype, device)
    if key not in _constants:
        _constants[key] = make(*args, dtype=dtype, device=device)
    return _constants[key]


def triton_for(vector: torch.Tensor) -> ModuleType | None:
    """
    The Triton kernels, if an operation on this vector is to use them.

    That is on CUDA, in float32 and in eager mode, where Triton can be imported and MABN_D2_TRITON is not 0 in the
    environment.
    """
    if vector.is_cuda and vector.dtype == torch.float32 and is_eager():
        return _import_triton(os.environ.get("MABN_D2_TRITON", "1"))
    return None


def triton_passes_for(x: torch.Tensor, vector: torch.Tensor) -> ModuleType | None:
    """The Triton kernels that go over a whole tensor, if they are to be used with x: see :func:`triton_for`."""
    if triton_for(vector) is None:
        return None
    from . import triton_passes

    return triton_passes if triton_passes.takes(x) else None


@functools.cache
def _import_triton(switch: str) -> ModuleType | None:
    if switch == "0":
        return None
    try:
        from . import triton_vectors
    except ImportError:
        return None
    return triton_vectors
