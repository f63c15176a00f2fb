"""Hooks for Detectron2's training loop."""

import itertools
import os
from collections.abc import Callable, Iterable

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from .. import training
from ..checkpoint import Checkpointer
from ..training import average_norm_statistics, population_statistics


@torch.no_grad()
def update_norm_statistics(model: nn.Module, batches: Iterable, num_iters: int) -> None:
    """
    Recomputes the running statistics of all norms over `num_iters` batches with fixed weights.

    Args:
        model: in training mode; called with each batch.
        batches: iterable of what the model takes, at least `num_iters` long.
    """
    with population_statistics(model), EventStorage():  # what the model logs is not training's
        if get_bn_modules(model):
            update_bn_stats(model, batches, num_iters)
        else:
            for batch in itertools.islice(batches, num_iters):
                model(batch)


class PreciseStatistics(HookBase):
    """
    `TEST.PRECISE_BN` for all norms: recomputes their running statistics before evaluation.

    Detectron2's own `PreciseBN` passes over every norm that it does not know.
    """

    def __init__(self, period: int, build_loader: Callable[[int], Iterable], num_iters: int):
        """
        Args:
            period: iterations between evaluations, 0 for after the last iteration only.
            build_loader: called with the iteration; the training batches to use there.
            num_iters: number of batches.
        """
        self._period = period
        self._build_loader = build_loader
        self._num_iters = num_iters

    def after_step(self):
        trainer = self.trainer
        next_iter = trainer.iter + 1
        if next_iter == trainer.max_iter or (self._period > 0 and next_iter % self._period == 0):
            loader = self._build_loader(trainer.iter)
            update_norm_statistics(trainer.model, iter(loader), self._num_iters)


class SyncNormStatistics(HookBase):
    """
    Averages the statistics of the norms over all workers before each evaluation and checkpoint.

    Every worker normalizes with its own statistics in training, that is the point of MABN. What is
    evaluated and saved must be one model. The moving averages are averaged along with the running
    statistics: training then goes on from exactly what a resumed run finds in the checkpoint.
    """

    def __init__(self, *periods: int):
        """
        Args:
            periods: iterations between evaluations, between checkpoints; 0 stands for never.
                The statistics are also averaged after the last iteration.
        """
        self._periods = [period for period in periods if period > 0]

    def after_step(self):
        next_iter = self.trainer.iter + 1
        is_final = next_iter == self.trainer.max_iter
        if is_final or any(next_iter % period == 0 for period in self._periods):
            average_norm_statistics(self.trainer.model)


class FinalCheckpoint(HookBase):
    """
    Writes `model_final` when a run is resumed that was stopped between its last iteration and that.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def before_train(self):
        trainer = self.trainer
        path = os.path.join(self._checkpointer.save_dir, "model_final.pth")
        if trainer.start_iter >= trainer.max_iter and not os.path.exists(path):
            trainer.iter = trainer.max_iter - 1
            self._checkpointer.save("model_final", iteration=trainer.iter)


class DoubleForward(HookBase):
    """
    :class:`mabn_d2.training.DoubleForward` after each step of the optimizer.

    Belongs in front of all other hooks: what they measure, average or save contains its result.
    """

    def before_train(self):
        model = self.trainer.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self._double_forward = training.DoubleForward(model)

    def after_step(self):
        with EventStorage(self.trainer.iter):  # what the model logs again is nobody's
            self._double_forward.renew()

    def after_train(self):
        self._double_forward.remove()
