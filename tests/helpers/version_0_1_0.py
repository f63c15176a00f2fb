"""
The tiny models, data and runs behind the files in data/v0.1.0.

The same code makes the files with that version and reads them with any later one, so it uses what
users of both import and nothing else of the package.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn
from torch.nn import functional as F

from mabn_d2 import MABN2d, add_mabn_config
from mabn_d2.classification import Classifier
from mabn_d2.engine import LazyTrainer, Trainer

try:
    from mabn_d2.classification.data import ClassificationTrainLoader
except ModuleNotFoundError:  # its place in version 0.1.0
    from mabn_d2.data.classification import ClassificationTrainLoader

FOLDER = Path(__file__).parents[1] / "data" / "v0.1.0"
NORMS = ("BN", "BRN", "MBN", "MABN")
# A folder of FOLDER for each: detectors by their norm, and a classifier with MABN.
RUNS = (*NORMS, "classifier")

SEED = 7
MAX_ITER = 14
CHECKPOINT_ITERS = 6  # that were done when the checkpoint was written
CHECKPOINT = f"model_{CHECKPOINT_ITERS - 1:07d}.pth"

# At the checkpoint, averages and memories are partly filled and the bounds of BRN are growing. By
# the end, averages are used (from iteration 9 on), r is free (from 11) and all rings are full.
_OPTIONS = {
    "MABN": {"MOMENTUM": 0.1, "BUFFER_SIZE": 8, "WARMUP_ITERS": 2, "RENORM_START_ITER": 10},
    "BRN": {"MOMENTUM": 0.1, "R_MAX_ITERS": (2, 12), "D_MAX_ITERS": (1, 9)},
    "MBN": {"MEMORY_SIZE": 8, "CURRENT_WEIGHT": 0.6, "DECAY": 0.8},
}


# ---- data ----------------------------------------------------------------------------------------


def _pixels(count: int, height: int, width: int) -> np.ndarray:
    """Images that differ in colour, of shape (count, height, width, 3)."""
    random = np.random.RandomState(0)  # its numbers are the same in every version of numpy
    colour = random.randint(0, 200, (count, 1, 1, 3))
    return (colour + random.randint(0, 56, (count, height, width, 3))).astype(np.uint8)


def register_images(folder: Path) -> None:
    """Writes ten images of 16x24 and 24x16 pixels with a box each and registers them as `tiny`."""
    images, annotations = [], []
    for index, pixels in enumerate(_pixels(10, 16, 24)):
        if index % 3 == 0:
            pixels = pixels.transpose(1, 0, 2)
        height, width, _ = pixels.shape
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        annotations.append(
            {"id": index + 1, "image_id": index, "category_id": index % 2 + 1, "iscrowd": 0,
             "bbox": [index % 4, index % 5, 8, 6], "area": 48}
        )  # fmt: skip
    categories = [{"id": 1, "name": "first"}, {"id": 2, "name": "second"}]
    file = folder / "tiny.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    if "tiny" in DatasetCatalog.list():
        DatasetCatalog.remove("tiny")
        MetadataCatalog.remove("tiny")
    register_coco_instances("tiny", {}, str(file), str(folder))


class LabelledImages(torch.utils.data.Dataset):
    """Ten PIL images of 16x16 pixels with a label from 0 to 2, flipped at random."""

    def __init__(self):
        self.pixels = _pixels(10, 16, 16)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        image = Image.fromarray(self.pixels[index])
        if np.random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, index % 3


# ---- models --------------------------------------------------------------------------------------


@BACKBONE_REGISTRY.register()
class TinyBackbone(Backbone):
    """A convolution with a norm, and a second level that is pooled from the first."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv1 = Conv2d(
            3, 4, kernel_size=3, stride=2, padding=1, bias=False,
            norm=get_norm(cfg.MODEL.RESNETS.NORM, 4), activation=F.relu,
        )  # fmt: skip

    def forward(self, images):
        p1 = self.conv1(images)
        return {"p1": p1, "p2": F.max_pool2d(p1, 2)}

    def output_shape(self):
        return {"p1": ShapeSpec(channels=4, stride=2), "p2": ShapeSpec(channels=4, stride=4)}


@META_ARCH_REGISTRY.register()
class TinyDetector(nn.Module):
    """The backbone, and the classifying half of RetinaNet's head, one class per image."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.head = RetinaNetHead(
            input_shape=list(self.backbone.output_shape().values()),
            num_classes=cfg.MODEL.RETINANET.NUM_CLASSES, num_anchors=1, conv_dims=[4],
            norm=cfg.MODEL.RETINANET.NORM, prior_prob=0.5,
        )  # fmt: skip
        del self.head.bbox_subnet, self.head.bbox_pred  # the files are to be small
        nn.init.normal_(self.head.cls_subnet[0].weight, std=0.2)
        nn.init.normal_(self.head.cls_score.weight, std=0.2)

    def forward(self, batch):
        images = torch.stack([entry["image"] for entry in batch]).float() / 64 - 2
        if self.training:  # a random number in each iteration
            images = images + torch.rand(len(images), 1, 1, 1)
        levels = self.backbone(images).values()
        logits = [self.head.cls_score(self.head.cls_subnet(level)) for level in levels]
        logits = sum(level.mean((2, 3)) for level in logits)
        if not self.training:
            return [{"logits": row} for row in logits]
        classes = torch.cat([entry["instances"].gt_classes for entry in batch])
        return {"loss_cls": F.cross_entropy(logits, classes)}


def detector_config(norm: str, output: Path) -> CfgNode:
    """The run of :class:`TinyDetector` on the images of :func:`register_images`."""
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "TinyDetector"
    cfg.MODEL.BACKBONE.NAME = "TinyBackbone"
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.RETINANET.NORM = norm
    for key, value in _OPTIONS.get(norm, {}).items():
        cfg.MODEL[norm][key] = value
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (16,), 24
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.002
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01, 0.001
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 8, (11,)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = MAX_ITER, CHECKPOINT_ITERS
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SEED = SEED
    cfg.OUTPUT_DIR = str(output)
    return cfg


def classifier_config(output: Path) -> DictConfig:
    """A residual block with MABN on :class:`LabelledImages`, four at a time, normalized in twos."""
    # These count normalization batches.
    norm = partial(MABN2d, momentum=0.1, buffer_size=16, warmup_iters=4, renorm_start_iter=20)
    cfg = OmegaConf.create()
    cfg.model = L(Classifier)(
        stem=L(BasicStem)(in_channels=3, out_channels=2, norm=norm),
        stages=[[L(BasicBlock)(in_channels=2, out_channels=2, norm=norm)]],
        num_classes=3,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[57.375, 57.12, 58.395],
        norm_batch_size=2,
    )
    cfg.dataloader = {"train": L(ClassificationTrainLoader)(
        dataset=L(LabelledImages)(), total_batch_size=4
    )}  # fmt: skip
    cfg.optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.001), lr=0.005, momentum=0.9,
        weight_decay=0.01,
    )  # fmt: skip
    cfg.lr_multiplier = L(MultiStepParamScheduler)(
        values=[1.0, 0.1], milestones=[11], num_updates=MAX_ITER
    )
    cfg.train = model_zoo.get_config("common/train.py").train
    cfg.train.merge_with(
        {"output_dir": str(output), "max_iter": MAX_ITER, "eval_period": 0, "device": "cpu",
         "init_checkpoint": "", "seed": SEED, "double_forward": False}
    )  # fmt: skip
    cfg.train.checkpointer.period = CHECKPOINT_ITERS
    return cfg


# ---- runs ----------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """What a run that ends at MAX_ITER gave."""

    losses: list[float]  # the total loss of each of its iterations
    final: dict[str, torch.Tensor]  # the model's state after the last


class _RecordLosses(HookBase):
    def __init__(self):
        self.losses = []

    def after_step(self):
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])


def build_trainer(run: str, output: Path, weights: str = "") -> DefaultTrainer:
    """
    The trainer of a run, as a user's script builds it.

    Args:
        run: of RUNS.
        output: folder of the checkpoints.
        weights: a file to start from if there is no checkpoint.
    """
    if run == "classifier":
        cfg = classifier_config(output)
        cfg.train.init_checkpoint = weights
        return LazyTrainer(cfg)
    cfg = detector_config(run, output)
    cfg.MODEL.WEIGHTS = weights
    return Trainer(cfg)


def train(run: str, output: Path) -> Recorded:
    """Trains from the last checkpoint in the folder, or else from a fixed initialization."""
    output.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = build_trainer(run, output)
    trainer.resume_or_load(resume=True)
    recorder = _RecordLosses()
    trainer.register_hooks([recorder])
    trainer.train()
    return Recorded(recorder.losses, trainer.model.state_dict())


def outputs(run: str, output: Path, weights: str) -> torch.Tensor:
    """What the model with these weights gives in evaluation for two fixed images, shape (2, K)."""
    trainer = build_trainer(run, output, weights)
    trainer.resume_or_load(resume=False)
    images = torch.from_numpy(_pixels(12, 16, 16)[10:].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        result = trainer.model.eval()([{"image": image} for image in images])
    return torch.stack([entry["logits"] for entry in result])


def as_vector(state: dict[str, torch.Tensor], names: Iterable[str]) -> np.ndarray:
    """The named tensors of a state dict as one float32 vector."""
    return torch.cat([state[name].detach().flatten().float() for name in names]).numpy()
