"""Top-1 and top-5 accuracy."""

from collections import OrderedDict

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


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
