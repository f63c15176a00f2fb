"""Runs an exported detector as Detectron2 runs a model."""

import json
import os
from typing import Any

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances


class ExportedDetector:
    """
    An exported file as a function of Detectron2's inputs, for its evaluators.

    Takes a list of dicts with "image" and gives a list of dicts with "instances", in the size of "height"
    and "width".
    """

    def __init__(self, path: str | os.PathLike):
        """
        Args:
            path: a file that :func:`export_detector` has written, ONNX if it is named `*.onnx`.

        Raises:
            ImportError: onnxruntime is not installed.
        """
        if str(path).endswith(".onnx"):
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            self._run = lambda image: dict(
                zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})))
            )
            return
        extra = {"outputs": ""}
        module = torch.jit.load(str(path), _extra_files=extra)
        if extra["outputs"]:
            names = json.loads(extra["outputs"])
            self._run = lambda image: dict(zip(names, module(image)))
        else:  # scripted
            self._run = lambda image: module(({"image": image},))[0]

    def __call__(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for given in inputs:
            image = given["image"].float()
            fields = self._run(image)
            fields.pop("image_size", None)
            height, width = image.shape[-2:]
            boxes = fields["pred_boxes"]
            fields["pred_boxes"] = Boxes(getattr(boxes, "tensor", boxes))
            instances = Instances((height, width), **fields)
            size = given.get("height", height), given.get("width", width)
            outputs.append({"instances": detector_postprocess(instances, *size)})
        return outputs
