"""What runs around an operator decides which form of it is used."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_eager() -> bool:
    """Whether operators run as they are called: nothing compiles them or handles them instead."""
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


_constants: dict[tuple, torch.Tensor] = {}


def constant(
    make: Callable[..., torch.Tensor], *args, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """
    make(*args, dtype=dtype, device=device), made once: on CUDA it is a launch or a copy. Not to be written to.

    Args:
        make: a factory such as `torch.zeros`.
    """
    if not is_eager():
        return make(*args, dtype=dtype, device=device)
    key = (make, args, dtype, device)
    if key not in _constants:
        _constants[key] = make(*args, dtype=dtype, device=device)
    return _constants[key]
