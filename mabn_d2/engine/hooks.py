"""Hooks for Detectron2's training loop."""

import itertools
import json
import os
from collections.abc import Callable, Iterable

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from .. import training
from ..checkpoint import Checkpointer
from ..data.loader import ResumableLoader
from ..layers import MBN2d
from ..statistics import StatisticsRecorder
from ..training import average_norm_statistics, population_statistics
from ..utils.random import seed_from


@torch.no_grad()
def update_norm_statistics(model: nn.Module, batches: Iterable, num_iters: int) -> None:
    """
    Recomputes the running statistics of all norms over `num_iters` batches with fixed weights.

    Args:
        model: in training mode; called with each batch.
        batches: iterable of what the model takes, at least `num_iters` long.

    Raises:
        ValueError: there are fewer batches; the statistics have not changed.
    """
    with population_statistics(model), EventStorage():  # what the model logs is not training's
        count = 0
        for count, batch in enumerate(itertools.islice(batches, num_iters), start=1):  # noqa: B007
            model(batch)
        if count < num_iters:
            raise ValueError(f"Statistics over {num_iters} batches were asked for, got {count}")


def statistics_batches(trainer: TrainerBase) -> Iterable:
    """Batches of a trainer's training data, drawn for its iteration beside those that it trains on."""
    if isinstance(trainer.train_loader, ResumableLoader):
        return trainer.train_loader.replica(seed_from(trainer.seed, trainer.iter))
    return trainer.build_train_loader(trainer.cfg)


class PreciseStatistics(HookBase):
    """
    `TEST.PRECISE_BN` for all norms: recomputes their running statistics before evaluation.

    Detectron2's own `PreciseBN` passes over every norm that it does not know. The batches depend on the
    iteration alone, or a resumed run would get others.
    """

    def __init__(self, period: int, num_iters: int):
        """
        Args:
            period: iterations between evaluations, 0 for after the last iteration only.
            num_iters: number of training batches.
        """
        self._period = period
        self._num_iters = num_iters

    def after_step(self):
        trainer = self.trainer
        next_iter = trainer.iter + 1
        if next_iter == trainer.max_iter or (self._period > 0 and next_iter % self._period == 0):
            update_norm_statistics(trainer.model, statistics_batches(trainer), self._num_iters)


class SyncNormStatistics(HookBase):
    """
    Averages the statistics of the norms over all workers, virtual ones too, before each evaluation and checkpoint.

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
            workers = getattr(self.trainer, "virtual_workers", None)
            if workers is not None:  # a trainer of one's own has none
                workers.average()
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
        self._double_forward.renew()

    def after_train(self):
        if hasattr(self, "_double_forward"):  # else a hook has failed before training
            self._double_forward.remove()


class RecordStatistics(HookBase):
    """
    Writes the ℓ2 norms of batch statistics into the trainer's storage and its `metrics.json`.

    As `statistics/LAYER/QUANTITY`, see :class:`mabn_d2.statistics.StatisticsRecorder`, of the last call and
    normalization batch of an iteration: a mean over them would swing less than what the norm takes from
    one. They are those of the main process. `metrics.json` gets every recorded iteration; the other
    writers take what is newest at each line of the log.
    """

    def __init__(self, layers: Iterable[str], period: int):
        """
        Args:
            layers: patterns of names of norms.
            period: every how many iterations something is recorded.
        """
        self._layers, self._period = layers, period

    def before_train(self):
        trainer = self.trainer
        model = trainer.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self._recorder = StatisticsRecorder(
            model,
            self._layers,
            self._period,
            grad_scaler=getattr(trainer._trainer, "grad_scaler", None),
            start_iter=trainer.start_iter,
        )

    def after_step(self):
        self._recorder.step()
        values = {
            f"statistics/{record.layer}/{record.quantity}": record.values[-1]
            for record in self._recorder.flush()
        }
        self._recorder.records.clear()
        if values and comm.is_main_process():
            self.trainer.storage.put_scalars(smoothing_hint=False, **values)
            path = os.path.join(self.trainer.checkpointer.save_dir, "metrics.json")
            with open(path, "a") as f:
                f.write(json.dumps({"iteration": self.trainer.iter, **values}) + "\n")

    def after_train(self):
        if hasattr(self, "_recorder"):
            self._recorder.remove()


def build_hooks(
    trainer: TrainerBase,
    *,
    double_forward: bool,
    precise_iters: int,
    eval_period: int,
    evaluate: Callable | None,
    checkpoints: dict[str, int],
    log_period: int = 20,
    statistics: tuple[Iterable[str], int] | None = None,
) -> list[HookBase]:
    """
    The hooks of both trainers, in the order in which they run after each iteration.

    Args:
        trainer: a :class:`ResumableTrainer`.
        double_forward: whether MBN, where it is in the model, renews its memory.
        precise_iters: batches of :class:`PreciseStatistics`; 0 for none.
        eval_period: iterations between evaluations, 0 for after the last iteration only.
        evaluate: called without arguments, returns the results; None for no evaluation.
        checkpoints: `period` and perhaps `max_to_keep` of `PeriodicCheckpointer`.
        log_period: iterations between lines of the log.
        statistics: layers and period of :class:`RecordStatistics`; None for none.
    """
    is_main = comm.is_main_process()
    has_memory = any(isinstance(module, MBN2d) for module in trainer.model.modules())
    ret: list[HookBase] = []
    if statistics is not None:
        ret.append(RecordStatistics(*statistics))
    if double_forward and has_memory:
        ret.append(DoubleForward())
    ret += [hooks.IterationTimer(), hooks.LRScheduler()]
    if precise_iters:
        ret.append(PreciseStatistics(eval_period, precise_iters))
    ret.append(SyncNormStatistics(eval_period, checkpoints["period"]))
    if is_main:
        ret.append(FinalCheckpoint(trainer.checkpointer))
        ret.append(hooks.PeriodicCheckpointer(trainer.checkpointer, **checkpoints))
    if evaluate is not None:
        ret.append(hooks.EvalHook(eval_period, evaluate))
    if is_main:  # last, so that it writes what the others have measured
        ret.append(hooks.PeriodicWriter(trainer.build_writers(), log_period))
    return ret
