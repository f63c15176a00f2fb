"""What the trainers for yacs configs and for LazyConfigs have in common."""

import random
import weakref
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.reading import read_checkpoint
from ..utils.random import seed_from


def check_num_workers(output_dir: str, num_workers: int) -> None:
    """
    For a run that is to be resumed from the last checkpoint of a folder, if there is one.

    Raises:
        ValueError: another number of workers trained it, with which an iteration is another part of
            the data and of the schedule.
    """
    checkpointer = Checkpointer(nn.Module(), output_dir)
    if checkpointer.has_checkpoint():
        checkpoint = read_checkpoint(checkpointer.get_checkpoint_file())
        _check_num_workers(checkpoint.get("trainer", {}), num_workers)


def _check_num_workers(trainer_state: dict, num_workers: int) -> None:
    before = trainer_state.get("num_workers", num_workers)  # version 0.1.0 does not save it
    if before != num_workers:
        raise ValueError(
            f"The run to resume was trained by {before} worker{'s' * (before != 1)}, it cannot go on "
            f"with {num_workers}"
        )


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

        Args:
            resume: whether to look for a checkpoint.
        """
        self.checkpointer.resume_or_load(self.weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1  # the checkpoint has the iteration that was completed
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
        return {
            **super().state_dict(),
            "seed": self.seed,
            "num_workers": comm.get_world_size(),
        }

    def load_state_dict(self, state_dict):
        _check_num_workers(state_dict, comm.get_world_size())
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
