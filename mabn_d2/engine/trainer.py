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
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm

from ..data.loader import build_train_loader
from ..layers import MABN2d
from ..plugin.registry import count_workers
from ..surgery import fold
from .hooks import build_hooks
from .resumable import ResumableTrainer

logger = logging.getLogger(__name__)
# By the `evaluator_type` of a data set.
EVALUATORS = {
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
        self.cfg = cfg = self.auto_scale_workers(cfg, count_workers(cfg, comm.get_world_size()))
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
            weights_import=cfg.MODEL.get("WEIGHTS_IMPORT", "exact"),
            amp=cfg.SOLVER.AMP.ENABLED,
            virtual_workers=cfg.SOLVER.get("VIRTUAL_WORKERS", 1),
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
            evaluate=self._evaluate,
            checkpoints={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
            statistics=_recorded_statistics(cfg),
        )

    def _evaluate(self):
        results = self.test(self.cfg, self.model)
        is_last = self.iter + 1 >= self.max_iter
        if self.cfg.TEST.AUG.ENABLED and is_last:
            results.update(self.test_with_augmentation(self.cfg, self.model))
        self._last_eval_results = results  # `train` verifies them
        return results

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """
        The evaluators for the data set's `evaluator_type`.

        They write into the folder `inference`, those of further data sets below it.

        Raises:
            NotImplementedError: there are none; `test` goes on to the next data set then.
        """
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if dataset_name in cfg.DATASETS.TEST[1:]:  # or it would overwrite what the first one writes
            output_dir = os.path.join(output_dir, dataset_name)
        kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
        if kind not in EVALUATORS:
            logger.warning(
                "DATASETS.TEST: %s is not evaluated: its evaluator_type is %r, accepted are %s",
                dataset_name, kind, ", ".join(EVALUATORS),
            )  # fmt: skip
            raise NotImplementedError
        evaluators = []
        for create in EVALUATORS[kind]:
            if create is COCOEvaluator:
                sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
                evaluators.append(
                    COCOEvaluator(dataset_name, output_dir=output_dir, kpt_oks_sigmas=sigmas)
                )
            elif create in (SemSegEvaluator, LVISEvaluator, COCOPanopticEvaluator):
                evaluators.append(create(dataset_name, output_dir=output_dir))
            else:
                evaluators.append(create(dataset_name))
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluates a copy of the model in which norms are part of their convolutions, see `fold`."""
        return super().test(cfg, fold(model), evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg, model):
        """
        `TEST.AUG`: evaluates once more, on several sizes of each image and flipped.

        Writes below the folder `tta` of the output folder.

        Returns:
            as `test` does, each name with the suffix `_TTA`, as Detectron2's `tools/train_net.py`.
        """
        logger.info("Evaluating with test-time augmentation")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model))
        return {f"{name}_TTA": result for name, result in results.items()}


def _recorded_statistics(cfg: CfgNode) -> tuple[list[str], int] | None:
    options = cfg.get("STATISTICS", {"ENABLED": False})
    return (list(options["LAYERS"]), options["PERIOD"]) if options["ENABLED"] else None


def _log_simulated_batch(model: torch.nn.Module, cfg: CfgNode) -> None:
    """Says so where the moving averages span another number of images than the paper's 32."""
    norms = [module for module in model.modules() if isinstance(module, MABN2d)]
    if not norms:
        return
    images = cfg.SOLVER.IMS_PER_BATCH // count_workers(cfg, comm.get_world_size())
    size = norms[0].psi.size
    if not 16 <= images * size <= 64:
        logger.warning(
            "MABN: the moving averages span %d images (%d images per worker x MODEL.MABN.BUFFER_SIZE "
            "%d). The paper uses 32: consider MODEL.MABN.BUFFER_SIZE %d.",
            images * size, images, size, max(1, round(32 / images)),
        )  # fmt: skip
