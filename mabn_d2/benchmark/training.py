"""Training Mask R-CNN on random images: what a step takes of time and memory."""

import gc
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances, PolygonMasks

from ..engine import Trainer
from ..engine.hooks import DoubleForward
from ..plugin import load_config

SIZE = (800, 1333)
# Files in configs/COCO-InstanceSegmentation. MBN's has Double-Forward.
CONFIGS = {
    "FrozenBN": "mask_rcnn_R_50_FPN_2x_frozenbn.yaml",
    "BN": "scratch_mask_rcnn_R_50_FPN_2x_bn.yaml",
    "GN": "scratch_mask_rcnn_R_50_FPN_2x_gn.yaml",
    "MABN": "scratch_mask_rcnn_R_50_FPN_2x_mabn.yaml",
    "BRN": "scratch_mask_rcnn_R_50_FPN_2x_brn.yaml",
    "MBN": "scratch_mask_rcnn_R_50_FPN_2x_mbn.yaml",
}
# The learning rate keeps weights that nobody trained from diverging; MABN is in its steady state once its
# buffers are full.
_OPTIONS = (
    "SOLVER.BASE_LR", 1e-6, "SOLVER.STEPS", (), "SOLVER.REFERENCE_WORLD_SIZE", 0,  # taken literally
    "MODEL.WEIGHTS", "", "MODEL.MABN.WARMUP_ITERS", 0, "MODEL.MABN.RENORM_START_ITER", 0,
)  # fmt: skip


class StepCost(NamedTuple):
    """Of training: milliseconds of each timed step, and the most memory at a time, in bytes."""

    times: list[float]
    allocated: int  # by tensors
    reserved: int  # from the device, the allocator's cache included


def measure_step(
    config: Path,
    amp: bool,
    images: int,
    size: tuple[int, int] = SIZE,
    steps: int = 3,
    warmup: int = 2,
    overrides: Sequence = (),
) -> StepCost:
    """
    Trains a detector on a GPU.

    Args:
        config: yacs config of a model with masks.
        size: height and width of the images.
        steps: that are timed. From its second step on, the optimizer has its state.
        warmup: steps before those.
        overrides: of the config, keys and values in turn.
    """
    cfg = load_config(str(config), [*_OPTIONS, *overrides])
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.IMS_PER_BATCH = amp, images
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = size[:1], size[1]
    cfg.SOLVER.MAX_ITER = warmup + steps
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    timer = _StepTimer()
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:
        trainer = RandomBatchTrainer(cfg)
        trainer.register_hooks([timer])
        trainer.train()
    times = timer.milliseconds()[warmup:]
    return StepCost(times, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


class RandomBatchTrainer(Trainer):
    """The trainer on one random batch, without evaluation and without checkpoints."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                # As the identity that it is before weights are loaded, half precision overflows.
                module.weight.fill_(0.5)
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        size = (*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
        return itertools.repeat([random_input(*size) for _ in range(cfg.SOLVER.IMS_PER_BATCH)])

    def build_hooks(self):
        return [hook for hook in super().build_hooks() if isinstance(hook, DoubleForward)]


class _StepTimer(HookBase):
    """Times whole iterations, hooks included, on the device's clock."""

    def __init__(self):
        self._events: list[torch.cuda.Event] = []

    def before_step(self):
        self._record()

    def after_train(self):
        self._record()

    def _record(self):
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def milliseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(self._events)]


def random_input(height: int, width: int) -> dict:
    """
    An image and its annotation in the format of Detectron2's mappers.

    There is an object at every 64th pixel, so that the samplers find as many foreground boxes as they want.
    """
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    instances = Instances((height, width))
    corners = itertools.product(range(0, width - 64, 64), range(0, height - 64, 64))
    boxes = [(x, y, x + 64, y + 64) for x, y in corners]
    instances.gt_boxes = Boxes(torch.tensor(boxes).float())
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.gt_masks = PolygonMasks(
        [[torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).numpy()] for x0, y0, x1, y1 in boxes]
    )
    return {"image": image, "instances": instances, "height": height, "width": width}
