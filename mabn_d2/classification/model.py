"""Image classification: the model that pre-trains a detector's backbone, and its accuracy."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import ResNet
from torch import nn
from torch.nn import functional as F

from ..surgery import set_norm_batch_size


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

    def forward(self, batched_inputs: list[dict[str, Any]]):
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
