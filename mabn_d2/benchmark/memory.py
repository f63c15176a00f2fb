"""Peak memory of training Mask R-CNN, as PyTorch's allocator counts it."""

import csv
import gc
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances, PolygonMasks

from ..engine import Trainer
from ..engine.hooks import DoubleForward
from ..plugin import load_config
from ..utils.files import atomic_write

SIZE = (800, 1333)
STEPS = 3  # from the second on, the optimizer has its state
# Of a 12 GiB GPU, what is left for the allocator where CUDA's context and libraries take 1 GiB.
AVAILABLE_OF_12_GIB = 11 * 2**30


class Peak(NamedTuple):
    """The most memory that training took at a time, in bytes."""

    norm: str
    amp: bool
    images: int
    allocated: int  # by tensors
    reserved: int  # from the device, the allocator's cache included

    @property
    def fits_12_gib(self) -> bool:
        return self.reserved <= AVAILABLE_OF_12_GIB


def measure_peak(
    norm: str, config: Path, amp: bool, images: int, size: tuple[int, int] = SIZE
) -> Peak:
    """
    Trains a detector for :data:`STEPS` steps on random images.

    Args:
        norm: the row's name.
        config: yacs config of a model with masks.
        size: height and width of the images.
    """
    cfg = load_config(str(config))
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.AMP.ENABLED = amp
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = images, 0  # taken literally
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = size[:1], size[1]
    cfg.SOLVER.MAX_ITER = STEPS
    cfg.SOLVER.STEPS = ()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:
        _MemoryTrainer(cfg).train()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Peak(norm, amp, images, allocated, reserved)


class _MemoryTrainer(Trainer):
    """The trainer on one random batch, without evaluation and checkpoints."""

    @classmethod
    def build_train_loader(cls, cfg):
        size = (*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
        return itertools.repeat([random_input(*size) for _ in range(cfg.SOLVER.IMS_PER_BATCH)])

    def build_hooks(self):
        return [hook for hook in super().build_hooks() if isinstance(hook, DoubleForward)]


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


HEADER = f"{'norm':<10}{'AMP':>5}{'images':>8}{'allocated GiB':>15}{'reserved GiB':>14}{'fits 12 GiB':>13}"


def format_peak(peak: Peak) -> str:
    """A line of the table."""
    return (
        f"{peak.norm:<10}{'on' if peak.amp else 'off':>5}{peak.images:>8}"
        f"{peak.allocated / 2**30:>15.2f}{peak.reserved / 2**30:>14.2f}"
        f"{'yes' if peak.fits_12_gib else 'no':>13}"
    )


def write_csv(path: Path, peaks: Iterable[Peak]) -> None:
    """Writes the peaks. An interruption leaves no half-written file."""
    with atomic_write(str(path), "w") as file:
        writer = csv.writer(file)
        writer.writerow([*Peak._fields, "fits_12_gib"])
        writer.writerows([*peak, peak.fits_12_gib] for peak in peaks)
