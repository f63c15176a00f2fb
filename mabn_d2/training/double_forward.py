"""
Double-Forward, the training scheme of Memorized Batch Normalization.

Paper: Double Forward Propagation for Memorized Batch Normalization, AAAI 2018,
https://arxiv.org/abs/2010.04947
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..layers.mbn import MBN2d
from ..utils.random import keep_random_state, random_state, set_random_state
from .recording import no_recording

# What the second forward runs in, so that nothing outside of the model hears of a mini-batch twice.
# `mabn_d2.plugin` adds an event storage of Detectron2.
second_forward_contexts: list[Callable[[], AbstractContextManager]] = []


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
    back, and what the model logs to Detectron2's event storage is dropped. The loop may change its
    inputs in place: they are copied. Under `DistributedDataParallel` wrap the inner model; no worker waits for another.

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
            model: called once per mini-batch, in training mode and with gradients enabled. Its
                arguments are copied, so they must be tensors, containers of them or what
                `copy.deepcopy` takes.
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
        args, kwargs = tree_map(_copied, (args, kwargs))
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(keep_random_state())
            stack.enter_context(_attributes_kept(self.model))
            stack.enter_context(no_recording(self.model, but=self._memory_buffers()))
            for context in second_forward_contexts:
                stack.enter_context(context())
            for call in calls:
                set_random_state(call.random_state)
                with contextlib.ExitStack() as autocast:
                    for precision in call.autocast:
                        autocast.enter_context(precision)
                    self.model.forward(*call.args, **call.kwargs)


def _copied(argument: Any) -> Any:
    """An argument of the model that does not change with the loop's."""
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone()
    return copy.deepcopy(argument)


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of all modules back at the end."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)


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
