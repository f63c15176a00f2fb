"""Workers that take turns in one process."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .averaging import norms_with_statistics


class VirtualWorkers:
    """
    The statistics of the norms of several workers that train one model in turn, in one process.

    Each worker has buffers of its own for every norm, as the processes of `DistributedDataParallel` have with
    `broadcast_buffers=False`. With the mean of their gradients, and random numbers that agree, a step of the
    optimizer is that of as many processes to float rounding, in the memory that one worker takes.

    Example:
        workers = VirtualWorkers(model, 8)
        for batch in batches:
            for index in range(8):
                with workers.turn(index):
                    loss_of(model(batch[index::8])).backward()
            workers.average_gradients()
            optimizer.step()
            optimizer.zero_grad()
        workers.average()
    """

    def __init__(self, model: nn.Module, count: int):
        """
        Args:
            model: every worker starts from its statistics, which become the first one's.
            count: of workers.
        """
        self.model, self.count = model, count
        self.start()

    def start(self) -> None:
        """Every worker gets the statistics that the model has now."""
        parts = (part for norm in norms_with_statistics(self.model) for part in norm.modules())
        self._modules = list(dict.fromkeys(parts))
        self._buffers = [[module._buffers for module in self._modules]]
        for _ in range(1, self.count):
            self._buffers.append(
                [{k: _clone(v) for k, v in module._buffers.items()} for module in self._modules]
            )

    @contextlib.contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """In the block, forward and backward passes are those of a worker."""
        self._install(index)
        try:
            yield
        finally:
            self._install(0)

    def _install(self, index: int) -> None:
        for module, buffers in zip(self._modules, self._buffers[index]):
            module.__dict__["_buffers"] = buffers

    def average_gradients(self) -> None:
        """
        Turns the sum of the workers' gradients into their mean.

        To divide each loss instead would divide what norms record of gradients.
        """
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.count

    @torch.no_grad()
    def average(self) -> None:
        """Gives every worker the mean of all, as :func:`average_norm_statistics` does for processes."""
        if self.count == 1:
            return
        for of_one_module in zip(*self._buffers):
            for name, own in of_one_module[0].items():
                if own is not None:
                    tensors = [buffers[name] for buffers in of_one_module]
                    stacked = torch.stack(tensors)
                    mean = stacked.double().mean(0) if own.is_floating_point() else stacked.amin(0)
                    for tensor in tensors:
                        tensor.copy_(mean)


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()
