"""Image classification: the model that pre-trains a detector's backbone, and its accuracy."""
from collections import OrderedDict
from typing import Any, Dict, List, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import ResNet
from detectron2.utils import comm

from .surgery import set_norm_batch_size


class Classifier(ResNet):
    """
    Detectron2's ResNet with its linear layer, on images as Detectron2's detectors take them.

    It has the parameter names of the ImageNet models of Detectron2 (`stem.conv1.weight`,
    `res2.0.conv1.norm.weight`, ..., `linear.bias`), and its checkpoints say that names match by their
    ends: a checkpoint is a `MODEL.WEIGHTS` of any detector that has this backbone.
    """

    # For `Checkpointer`: what is written into the checkpoints.
    matching_heuristics = True

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        label_smoothing: float = 0.0,
        norm_batch_size: int = 0,
    ):
        """
        Args:
            stem, stages: as of `ResNet`.
            num_classes: K, the labels being 0 to K - 1.
            pixel_mean, pixel_std: per channel, in the order of the images' channels, as those of
                the detector.
            label_smoothing: share of the target distribution that all classes divide equally.
            norm_batch_size: images whose statistics a norm takes in training, see
                :func:`mabn_d2.surgery.set_norm_batch_size`; 0 stands for all images of a worker.

        Raises:
            ValueError: the size is negative, or a norm cannot normalize part of a batch.
        """
        super().__init__(stem, stages, num_classes=num_classes)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.label_smoothing = label_smoothing
        if norm_batch_size:
            set_norm_batch_size(self, norm_batch_size)

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """
        Args:
            batched_inputs: one dict per image, with "image", a tensor of shape (3, H, W) with values
                from 0 to 255 in the order BGR, the same size for all, and in training "label".

        Returns:
            in training {"loss_cls": tensor of shape ()}, in evaluation for each image
            {"logits": tensor of shape (K,)}.
        """
        device = self.pixel_mean.device
        images = torch.stack([entry["image"] for entry in batched_inputs]).to(device)
        logits = super().forward((images - self.pixel_mean) / self.pixel_std)["linear"]
        if not self.training:
            return [{"logits": row} for row in logits]
        labels = torch.tensor([entry["label"] for entry in batched_inputs], device=device)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss_cls": loss}


class AccuracyEvaluator(DatasetEvaluator):
    """
    Percentage of images whose label is the class of the largest logit, or among the five largest.

    `evaluate` returns {"classification": {"top1": ..., "top5": ...}} over the images of all workers
    on the main process, and None on the others.
    """

    def reset(self):
        self._images = self._top1 = self._top5 = 0

    def process(self, inputs, outputs):
        """
        Args:
            inputs, outputs: the model's, one dict per image; "label" and "logits", shape (K,), are
                used. With K < 5 the label of every image is among the five.
        """
        logits = torch.stack([output["logits"] for output in outputs])
        labels = torch.tensor([entry["label"] for entry in inputs], device=logits.device)
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        self._images += len(labels)
        self._top1 += int(hits[:, 0].sum())
        self._top5 += int(hits.sum())

    def evaluate(self):
        """
        Raises:
            ValueError: no worker has seen an image.
        """
        counts = comm.all_gather((self._images, self._top1, self._top5))
        images, top1, top5 = (sum(count) for count in zip(*counts))
        if images == 0:
            raise ValueError("AccuracyEvaluator: there are no images to evaluate")
        if not comm.is_main_process():
            return None
        accuracy = {"top1": 100 * top1 / images, "top5": 100 * top5 / images}
        return OrderedDict(classification=accuracy)
