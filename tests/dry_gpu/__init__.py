"""
Runs PyTorch's CUDA code on a machine without a GPU, and tells what it asked of the device.

In a program that `python -m tests.dry_gpu run` has started, `torch.cuda.is_available()` is true, kernels are
recorded and not run:

    with dry_gpu.record() as log:
        model(x).sum().backward()
    assert log.launches <= 100 and not log.syncs and not log.copies

In a block `with dry_gpu.compute():` the operators' results are computed on the CPU. See README.md.
"""

from .library import is_active
from .recording import Event, Frame, Log, record

__all__ = ["Event", "Frame", "Log", "compute", "is_active", "record"]


def compute(maps: bool = True):
    """
    A block in which the results of operators on the dry GPU are right: the CPU's. Blocks may be nested.

    Args:
        maps: False leaves operators out where a tensor of more than three dimensions takes part.

    See :class:`tests.dry_gpu.computing.Compute`.
    """
    from . import (
        computing,
    )  # imports PyTorch, which a process that only starts another does not need

    return computing.compute(maps)
