"""
Double-Forward, the training scheme of Memorized Batch Normalization.

Paper: Double Forward Propagation for Memorized Batch Normalization, AAAI 2018,
https://arxiv.org/abs/2010.04947
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers.mbn import MBN2d
from ..utils.random import random_state, set_random_state


class _Call(NamedTuple):
    """A forward pass that can be run again."""

    args: tuple
    kwargs: dict[str, Any]
    random_state: tuple
    autocast: tuple[torch.autocast, ...]


class DoubleForward:
    """
    Renews the memory of every :class:`MBN2d` of a model after the optimizer's step.

    The statistics that a mini-batch left in the memory are those of the weights before the step. The
    second forward runs the same mini-batch with the new weights, without gradient and with the
    same random numbers, and its statistics take the place of the first ones. If several
    mini-batches were run since the last step (gradient accumulation), all of them are run again.

    Nothing but the memories changes: all other buffers (BN's running statistics, MABN's moving
    averages), what a module keeps in its attributes, and the random number generators are put
    back. Under `DistributedDataParallel` wrap the inner model; no worker waits for another.

    Example:
        double_forward = DoubleForward(model)
        for batch in batches:
            loss = model(batch)
            loss.backward()
            optimizer.step()
            double_forward.renew()
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: called once per mini-batch, in training mode and with gradients enabled.
        """
        self.model = model
        self._calls: list[_Call] = []
        self._memories: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def remove(self) -> None:
        """Stops listening to the model."""
        self._handle.remove()
        self._calls.clear()

    def _remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if not self._calls:
            self._memories = [(buffer, buffer.clone()) for buffer in self._memory_buffers()]
        self._calls.append(_Call(args, kwargs, random_state(), _autocast()))

    def _memory_buffers(self) -> Iterator[torch.Tensor]:
        for module in self.model.modules():
            if isinstance(module, MBN2d):
                yield from module.buffers()

    @torch.no_grad()
    def renew(self) -> None:
        """Runs the mini-batches since the last call once more. Call it after `optimizer.step()`."""
        calls, self._calls = self._calls, []
        if not calls:
            return
        for buffer, before in self._memories:
            buffer.copy_(before)
        now = random_state()
        with _unchanged(self.model, list(self._memory_buffers())):
            try:
                for call in calls:
                    set_random_state(call.random_state)
                    with contextlib.ExitStack() as stack:
                        for autocast in call.autocast:
                            stack.enter_context(autocast)
                        self.model.forward(*call.args, **call.kwargs)
            finally:
                set_random_state(now)


@contextlib.contextmanager
def _unchanged(model: nn.Module, but: list[torch.Tensor]) -> Iterator[None]:
    """Puts the attributes and buffers of all modules back at the end, with the exception of `but`."""
    changing = {id(buffer) for buffer in but}
    buffers = [buffer for buffer in model.buffers() if id(buffer) not in changing]
    copies = [buffer.clone() for buffer in buffers]
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, before, buffers_before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
            module._buffers.update(buffers_before)
        for buffer, copy in zip(buffers, copies):
            buffer.copy_(copy)


def _autocast() -> tuple[torch.autocast, ...]:
    """Contexts that bring the present state of autocast back."""
    contexts = [
        torch.autocast("cpu", torch.get_autocast_cpu_dtype(), torch.is_autocast_cpu_enabled())
    ]
    if torch.cuda.is_available():  # without, PyTorch warns of a context for it
        contexts.append(
            torch.autocast("cuda", torch.get_autocast_gpu_dtype(), torch.is_autocast_enabled())
        )
    return tuple(contexts)
