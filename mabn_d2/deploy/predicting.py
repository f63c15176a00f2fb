"""Detects in images of any size, and draws what is found."""

import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge

from ..checkpoint import Checkpointer
from ..engine import Trainer
from ..report.predictions import draw_detections
from ..surgery import fold
from .running import ExportedDetector

SMALLEST_PICTURE = 512  # pixels of the longer side, so that labels are small against the objects


class Predictor:
    """
    The model of a config as a function of images.

    It is folded: no norm is left that can be part of a convolution.
    """

    def __init__(self, cfg: CfgNode, exported: str | None = None):
        """
        Args:
            cfg: its model has the weights MODEL.WEIGHTS.
            exported: a file of :func:`export_detector` that runs in the model's place.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: MODEL.WEIGHTS is empty or no checkpoint, `exported` is no such file, or
                INPUT.FORMAT is not BGR or RGB.
            ImportError: onnxruntime is not installed.
        """
        self._format = cfg.INPUT.FORMAT
        if self._format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT must be BGR or RGB, got {self._format}")
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._resize = ResizeShortestEdge(sizes[0], sizes[1]) if sizes[0] else None
        self._model = _load_exported(exported) if exported else _load_folded(cfg)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """
        Args:
            image: shape (H, W, 3), uint8, BGR.

        Returns:
            Detectron2's outputs for an image, on the CPU: "instances", "panoptic_seg", "sem_seg".
        """
        height, width = image.shape[:2]
        if self._format == "RGB":
            image = image[:, :, ::-1]
        if self._resize is not None:
            image = self._resize.get_transform(image).apply_image(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
        (output,) = self._model([{"image": pixels, "height": height, "width": width}])
        if "panoptic_seg" in output:
            segments, infos = output["panoptic_seg"]
            output["panoptic_seg"] = segments.cpu(), infos
        on_cpu = {k: output[k].to("cpu") for k in ("instances", "sem_seg") if k in output}
        return {**output, **on_cpu}


def _load_folded(cfg: CfgNode):
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty: the model would have random weights")
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model, weights_import=cfg.MODEL.WEIGHTS_IMPORT).load(cfg.MODEL.WEIGHTS)
    return fold(model)


def _load_exported(path: str) -> ExportedDetector:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the exported model {path} does not exist")
    try:
        return ExportedDetector(path)
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime: pip install onnxruntime") from error
    except Exception as error:  # TorchScript's and onnxruntime's own
        raise ValueError(
            f"{path} is no model that tools/export_model.py has written as ONNX or TorchScript"
        ) from error


def metadata_of(cfg: CfgNode) -> Metadata:
    """
    Names and colours of the classes: those of the first data set of DATASETS.TEST.

    Raises:
        OSError, ValueError: its annotations cannot be read.
    """
    name = next(iter(cfg.DATASETS.TEST), "")
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog.list() and not metadata.get("thing_classes"):
        DatasetCatalog.get(name)  # COCO's format names the classes in its file
    return metadata


def draw(
    image: np.ndarray, output: dict[str, Any], metadata: Metadata, threshold: float
) -> np.ndarray:
    """
    Draws a model's output into an image.

    Args:
        image: shape (H, W, 3), uint8, BGR.
        output: of :class:`Predictor`.
        metadata: names of the classes. A class without has its number.
        threshold: detections with a lower score are not drawn.

    Returns:
        Of the same kind. An image with less than 512 pixels on its longer side is enlarged to that.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the output is of another kind.
    """
    scale = max(SMALLEST_PICTURE / max(image.shape[:2]), 1.0)
    found = output.get("instances")
    if found is not None:
        found = found[found.scores >= threshold]
    if found is not None and "panoptic_seg" not in output and not found.has("pred_keypoints"):
        names = metadata.get("thing_classes") or [str(number) for number in range(1000)]
        return draw_detections(image[:, :, ::-1], found, names, scale)[:, :, ::-1].copy()
    try:
        from detectron2.utils.visualizer import Visualizer
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale)
    if "panoptic_seg" in output:
        visualizer.draw_panoptic_seg(*output["panoptic_seg"])
    elif found is not None:
        visualizer.draw_instance_predictions(found)
    elif "sem_seg" in output:
        visualizer.draw_sem_seg(output["sem_seg"].argmax(dim=0))
    else:
        raise ValueError(
            f"the model gives {', '.join(output)}; instances, panoptic_seg and sem_seg are drawn"
        )
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])
