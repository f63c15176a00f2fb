"""Detectron2's trainer with what few-image training of MABN needs."""

import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
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

from ..data.loader import build_train_loader
from ..layers import MABN2d
from .hooks import build_hooks
from .resumable import ResumableTrainer

_EVALUATORS = {
    "coco": [COCOEvaluator],
    "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
    "sem_seg": [SemSegEvaluator],
    "cityscapes_instance": [CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    "lvis": [LVISEvaluator],
    "pascal_voc": [PascalVOCDetectionEvaluator],
}


class Trainer(ResumableTrainer):
    """
    A `DefaultTrainer` that differs in four points.

    1. The statistics of all norms are averaged over the workers before each evaluation and
       checkpoint (:class:`SyncNormStatistics`).
    2. - 4. Those of :class:`ResumableTrainer`: a stopped and resumed run equals one that was not
       stopped, a checkpoint is whole or not there, and several workers can train on the CPU.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: config of Detectron2, with or without the options of `add_mabn_config`. A negative
                `SEED` stands for a random one, which is saved in the checkpoints.
        """
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        super().__init__(
            model,
            optimizer,
            self.build_train_loader(cfg),
            seed=cfg.SEED,
            max_iter=cfg.SOLVER.MAX_ITER,
            output_dir=cfg.OUTPUT_DIR,
            weights=cfg.MODEL.WEIGHTS,
            amp=cfg.SOLVER.AMP.ENABLED,
            broadcast_buffers=False,
        )
        _log_simulated_batch(model, cfg)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        """Those of :func:`mabn_d2.engine.hooks.build_hooks`."""
        cfg = self.cfg
        precise = cfg.TEST.PRECISE_BN
        return build_hooks(
            self,
            double_forward=cfg.MODEL.get("MBN", {}).get("DOUBLE_FORWARD", True),
            precise_iters=precise.NUM_ITER if precise.ENABLED else 0,
            eval_period=cfg.TEST.EVAL_PERIOD,
            evaluations=[(cfg.TEST.EVAL_PERIOD, self._evaluate)],
            checkpoints={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
        )

    def _evaluate(self):
        self._last_eval_results = self.test(self.cfg, self.model)  # `train` verifies them
        return self._last_eval_results

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
    size = norms[0].psi.size
    if not 16 <= images * size <= 64:
        logging.getLogger(__name__).warning(
            "MABN: the moving averages span %d images (%d images per worker x MODEL.MABN.BUFFER_SIZE "
            "%d). The paper uses 32: consider MODEL.MABN.BUFFER_SIZE %d.",
            images * size, images, size, max(1, round(32 / images)),
        )  # fmt: skip
