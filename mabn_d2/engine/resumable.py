"""What the trainers for yacs configs and for LazyConfigs have in common."""

import random
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint import Checkpointer, last_checkpoint, read_checkpoint
from ..utils.random import seed_from


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
        amp: bool,
        **ddp_options,
    ):
        """
        Args:
            model: takes a batch of the loader and returns a dict of losses.
            seed: of all random choices; a negative one stands for a random seed, which is saved in
                the checkpoints.
            weights: what training starts from if it does not resume; "" for the initialization.
            amp: whether to train in mixed precision.
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
        trainer_class = AMPTrainer if amp else SimpleTrainer
        self._trainer = trainer_class(model, train_loader, optimizer)
        self.checkpointer = Checkpointer(model, output_dir, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = max_iter
        self._place_loader()

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Loads the last checkpoint of the output folder and goes on from there, or the weights.

        All workers go on from the checkpoint that the first one finds.

        Args:
            resume: whether to look for a checkpoint.

        Raises:
            ValueError: of :func:`check_trainer_state`, or the file is no checkpoint.
        """
        self.checkpointer.resume_or_load(self.weights, resume=resume)
        self._place_loader()

    def _place_loader(self) -> None:
        if hasattr(self.train_loader, "start_iter"):
            self.train_loader.seed, self.train_loader.start_iter = self.seed, self.start_iter

    def run_step(self) -> None:
        torch_seed = seed_from(self.seed, comm.get_rank(), self.iter)
        random.seed(torch_seed)
        np.random.seed(torch_seed)
        torch.manual_seed(torch_seed)
        super().run_step()

    def state_dict(self):
        num_workers = comm.get_world_size()
        return {**super().state_dict(), "seed": self.seed, "num_workers": num_workers}

    def load_state_dict(self, state_dict):
        folder = self.checkpointer.save_dir
        check_trainer_state(state_dict, folder, self.max_iter, comm.get_world_size())
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        self.start_iter = self.iter + 1  # the checkpoint has the iteration that was completed


def check_resume(output_dir: str, max_iter: int, num_workers: int) -> None:
    """
    Finds before workers start what would stop them from resuming.

    Args:
        output_dir: folder that may have a last checkpoint.
        max_iter: iterations of the run.
        num_workers: on all machines together.

    Raises:
        OSError, ValueError: the last checkpoint cannot be read, or as for :func:`check_trainer_state`.
    """
    file = last_checkpoint(output_dir)
    if file:
        state = read_checkpoint(file).get("trainer", {})
        check_trainer_state(state, output_dir, max_iter, num_workers)


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
            f"The last checkpoint in {output_dir} is of {done} iterations, and SOLVER.MAX_ITER "
            f"(train.max_iter) is {max_iter}: to resume, it must be {done} or more"
        )
    trained_with = state.get("num_workers", num_workers)  # not in files of version 0.1.0
    if trained_with != num_workers:
        raise ValueError(
            f"The last checkpoint in {output_dir} is of a run with {trained_with} workers, which cannot be "
            f"resumed with {num_workers}: each worker has its own share of the batches. Start {trained_with}, "
            "or begin a new run with the checkpoint as MODEL.WEIGHTS (train.init_checkpoint)"
        )
