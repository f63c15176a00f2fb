"""Forward and backward passes that leave the statistics of norms as they are."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..layers import Norm2d


@contextlib.contextmanager
def no_recording(model: nn.Module, but: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """
    Runs passes through a model after which every statistic is to the bit what it was.

    For passes that are not the training's own: the second one of SAM, a teacher's in training mode, a
    look at the loss. In the block all norms, PyTorch's too, normalize as ever, but what they record
    goes into copies of the model's buffers, which are dropped at the end. A backward pass of what
    was computed in the block belongs to it, whenever it is run.

    Example:
        with no_recording(model):
            loss_of(model(batch)).backward()

    Args:
        model: any module. If it is run as `DistributedDataParallel`, that or the module inside.
        but: buffers of the model that are recorded into nevertheless.
    """
    recorded = {id(buffer) for buffer in but}
    buffers = [buffer for buffer in model.buffers() if id(buffer) not in recorded]
    contents = [(buffer, buffer.clone(), buffer._version) for buffer in buffers]
    copies = {id(buffer): buffer.clone() for buffer in buffers}
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    recomputed = [(m, m._last_statistics) for m in model.modules() if isinstance(m, Norm2d)]
    for module, tensors in modules:
        module._buffers.update({k: copies.get(id(v), v) for k, v in tensors.items()})
    try:
        yield
    finally:
        for module, tensors in modules:
            module._buffers.clear()
            module._buffers.update(tensors)
        for norm, statistics in recomputed:  # activation checkpointing asks for them in backward
            norm._last_statistics = statistics
        for buffer, content, version in contents:
            if buffer._version != version:  # DDP broadcasts into the buffers that it was made with
                buffer.data.copy_(content)
