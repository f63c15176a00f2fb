"""Detectron2's trainer with what few-image training of MABN needs."""
import logging
import os
import random
import weakref

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm

from ..checkpoint import Checkpointer
from ..data.loader import TrainLoader, build_train_loader, seed_from
from ..layers import MABN2d
from .hooks import FinalCheckpoint, PreciseStatistics, SyncNormStatistics

_EVALUATORS = {
    "coco": [COCOEvaluator],
    "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
    "sem_seg": [SemSegEvaluator],
    "cityscapes_instance": [CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    "lvis": [LVISEvaluator],
    "pascal_voc": [PascalVOCDetectionEvaluator],
}


class Trainer(DefaultTrainer):
    """
    A `DefaultTrainer` that differs in four points.

    1. The statistics of all norms are averaged over the workers before each evaluation and
       checkpoint (:class:`SyncNormStatistics`).
    2. An iteration is a function of the weights, the seed, the worker and the iteration number
       only, so a run that is stopped and resumed equals one that was not.
    3. A checkpoint replaces an older one only once it is completely written.
    4. Several workers can train on the CPU (gloo).
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: config of Detectron2, with or without the options of `add_mabn_config`. A negative
                `SEED` stands for a random one, which is saved in the checkpoints.
        """
        # DefaultTrainer's own constructor wraps the model for GPUs and builds another checkpointer.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = int(cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.train_loader = self.build_train_loader(cfg)
        _log_simulated_batch(model, cfg)

        ddp_options = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_options)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, self.train_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if isinstance(self.train_loader, TrainLoader):
            self.train_loader.seed, self.train_loader.start_iter = self.seed, self.start_iter

    def run_step(self) -> None:
        torch_seed = seed_from(self.seed, comm.get_rank(), self.iter)
        random.seed(torch_seed)
        np.random.seed(torch_seed)
        torch.manual_seed(torch_seed)
        super().run_step()

    def state_dict(self):
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)

    def build_hooks(self):
        cfg = self.cfg
        before = [SyncNormStatistics(cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD)]
        if cfg.TEST.PRECISE_BN.ENABLED:
            before.insert(
                0,
                PreciseStatistics(
                    cfg.TEST.EVAL_PERIOD, self._build_precise_loader, cfg.TEST.PRECISE_BN.NUM_ITER
                ),
            )
        ret = [h for h in super().build_hooks() if h and not isinstance(h, hooks.PreciseBN)]
        after = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        place = next(i for i, hook in enumerate(ret) if isinstance(hook, after))
        if comm.is_main_process():
            before.append(FinalCheckpoint(self.checkpointer))
        return [*ret[:place], *before, *ret[place:]]

    def _build_precise_loader(self, iteration: int):
        """Batches that depend on the iteration alone, or a resumed run would get others."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)
        if isinstance(loader, TrainLoader):
            loader.seed = seed_from(self.seed, iteration)
        return loader

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """The evaluators for the data set's `evaluator_type`."""
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind not in _EVALUATORS:
            raise ValueError(
                f"DATASETS.TEST: {dataset_name} has evaluator_type {kind!r}, accepted are "
                f"{', '.join(_EVALUATORS)}"
            )
        evaluators = []
        for create in _EVALUATORS[kind]:
            if create in (SemSegEvaluator, COCOEvaluator, LVISEvaluator, COCOPanopticEvaluator):
                evaluators.append(create(dataset_name, output_dir=output_dir))
            else:
                evaluators.append(create(dataset_name))
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _log_simulated_batch(model: torch.nn.Module, cfg: CfgNode) -> None:
    """Says so where the moving averages span another number of images than the paper's 32."""
    norms = [module for module in model.modules() if isinstance(module, MABN2d)]
    if not norms:
        return
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    size = norms[0].psi.buffer_size
    if not 16 <= images * size <= 64:
        logging.getLogger(__name__).warning(
            "MABN: the moving averages span %d images (%d images per worker x MODEL.MABN.BUFFER_SIZE "
            "%d). The paper uses 32: consider MODEL.MABN.BUFFER_SIZE %d.",
            images * size, images, size, max(1, round(32 / images)),
        )  # fmt: skip
