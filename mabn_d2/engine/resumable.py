"""What the trainers for yacs configs and for LazyConfigs have in common."""

import itertools
import logging
import random
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..checkpoint import Checkpointer
from ..surgery import measure_statistics
from ..training import VirtualWorkers, average_norm_statistics
from ..utils.random import seed_from
from .hooks import statistics_batches, update_norm_statistics

logger = logging.getLogger(__name__)
STATISTICS_ITERS = 50  # training batches for the statistics that weights do not hold


class TrainerInTurns(SimpleTrainer):
    """A `SimpleTrainer` whose step is that of several workers with a part of each batch."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        workers: VirtualWorkers,
        seed: Callable[[int], None],
    ):
        """
        Args:
            seed: called with a worker's index before its turn.
        """
        super().__init__(model, data_loader, optimizer)
        self.workers, self.seed = workers, seed

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        count = self.workers.count
        losses: dict[str, torch.Tensor] = {}
        for index in range(count):
            self.seed(index)
            with self.workers.turn(index):
                # What a sampler deals out to workers in turn.
                own = self.model(batch[index::count])
                sum(own.values()).backward()
            for name, loss in own.items():
                losses[name] = losses.get(name, 0) + loss.detach() / count
        self.workers.average_gradients()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class ResumableTrainer(DefaultTrainer):
    """
    A `DefaultTrainer` that differs in three points.

    1. An iteration is a function of the weights, the seed, the worker and the iteration number
       only, so a run that is stopped and resumed equals one that was not. The training loader takes
       part in this if it has the attributes `seed` and `start_iter` of
       :class:`mabn_d2.data.loader.TrainLoader`; another one starts from its beginning.
    2. A checkpoint replaces an older one only once it is completely written.
    3. Several workers can train on the CPU (gloo).

    A subclass builds the parts, sets `scheduler` and registers the hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Iterable,
        seed: int,
        max_iter: int,
        output_dir: str,
        weights: str,
        weights_import: str,
        amp: bool,
        virtual_workers: int = 1,
        **ddp_options,
    ):
        """
        Args:
            model: takes a batch of the loader and returns a dict of losses.
            seed: of all random choices; a negative one stands for a random seed, which is saved in
                the checkpoints.
            weights: what training starts from if it does not resume; "" for the initialization.
            weights_import: as of :class:`mabn_d2.checkpoint.Checkpointer`.
            amp: whether to train in mixed precision.
            virtual_workers: as how many workers to train in this process.
            ddp_options: of `create_ddp_model`.
        """
        # DefaultTrainer's own constructor builds all of this from a yacs config, for GPUs.
        TrainerBase.__init__(self)
        self.seed = int(seed if seed >= 0 else comm.shared_random_seed())
        self.train_loader = train_loader
        self.weights = weights
        if not next(model.parameters()).is_cuda:
            ddp_options["device_ids"] = None
        model = create_ddp_model(model, **ddp_options)
        self.virtual_workers = VirtualWorkers(model, virtual_workers)
        if virtual_workers > 1:
            self._trainer = TrainerInTurns(
                model, train_loader, optimizer, self.virtual_workers, self._seed
            )
        else:
            trainer_class = AMPTrainer if amp else SimpleTrainer
            self._trainer = trainer_class(model, train_loader, optimizer)
        self.checkpointer = Checkpointer(
            model, output_dir, weights_import=weights_import, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = max_iter
        self._place_loader()

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Loads the last checkpoint of the output folder and goes on from there, or the weights.

        All workers go on from the checkpoint that the first one finds. Statistics that weights do not hold
        are measured on `STATISTICS_ITERS` training batches.

        Args:
            resume: whether to look for a checkpoint.

        Raises:
            ValueError: of :func:`check_trainer_state`, or the file is no checkpoint.
        """
        self.checkpointer.resume_or_load(self.weights, resume=resume)
        self._place_loader()
        if self.checkpointer.unmeasured:
            self._estimate_statistics()
        self.virtual_workers.start()

    def _estimate_statistics(self) -> None:
        """What `weights_import` leaves to the training data."""
        model, unmeasured = self.checkpointer.model, self.checkpointer.unmeasured
        self.iter = -1  # the batches are none of training's
        self._seed(comm.get_rank())
        batches = itertools.islice(statistics_batches(self), STATISTICS_ITERS)
        if self.checkpointer.weights_import == "adapt":
            update_norm_statistics(model, batches, STATISTICS_ITERS)
            average_norm_statistics(model)
            left = []
        else:
            with EventStorage():  # what the model logs is not training's
                left = measure_statistics(model, unmeasured, batches)
        self.iter = self.start_iter
        logger.info(
            "The statistics of %d norms are those of %d training batches",
            len(unmeasured) - len(left), STATISTICS_ITERS,
        )  # fmt: skip
        if left:
            logger.warning(
                "The statistics of %d norms could not be measured: they saw nothing, or have no γ and β. "
                "They start at mean 0 and variance 1: %s", len(left), ", ".join(left),
            )  # fmt: skip

    def _place_loader(self) -> None:
        if hasattr(self.train_loader, "start_iter"):
            loader: Any = self.train_loader
            loader.seed, loader.start_iter = self.seed, self.start_iter

    def _seed(self, worker: int) -> None:
        """Makes all random choices those of the seed, the worker and the iteration."""
        torch_seed = seed_from(self.seed, worker, self.iter)
        random.seed(torch_seed)
        np.random.seed(torch_seed)
        torch.manual_seed(torch_seed)

    @property
    def num_workers(self) -> int:
        """Processes, or the virtual workers of this one."""
        return comm.get_world_size() * self.virtual_workers.count

    def run_step(self) -> None:
        self._seed(comm.get_rank())
        super().run_step()

    def state_dict(self):
        return {**super().state_dict(), "seed": self.seed, "num_workers": self.num_workers}

    def load_state_dict(self, state_dict):
        folder = self.checkpointer.save_dir
        check_trainer_state(state_dict, folder, self.max_iter, self.num_workers)
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        self.start_iter = self.iter + 1  # the checkpoint has the iteration that was completed


def check_trainer_state(
    state: dict[str, Any], output_dir: str, max_iter: int, num_workers: int
) -> None:
    """
    Raises:
        ValueError: a run with this number of iterations and workers cannot go on from the trainer's state.
    """
    done = state.get("iteration", -1) + 1
    if done > max_iter:
        raise ValueError(
            f"The last checkpoint in {output_dir} is of {done} iterations, and the run ends after {max_iter}: "
            f"to resume, SOLVER.MAX_ITER (train.max_iter) must be {done} or more"
        )
    before = state.get("num_workers", num_workers)  # version 0.1.0 does not save it
    if before != num_workers:
        raise ValueError(
            f"The last checkpoint in {output_dir} was trained by {before} worker{'s' * (before != 1)}, it "
            f"cannot go on with {num_workers}: an iteration is another part of the data and of the schedule. "
            "A new run may take it as MODEL.WEIGHTS (train.init_checkpoint)"
        )
