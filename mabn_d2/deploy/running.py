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
            path: a file that :func:`export_detector` has written by tracing or as ONNX (`*.onnx`).

        Raises:
            ImportError: onnxruntime is not installed.
        """
        if str(path).endswith(".onnx"):
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            self._names = [output.name for output in session.get_outputs()]
            self._run = lambda image: map(
                torch.from_numpy, session.run(None, {"image": image.numpy()})
            )
        else:
            extra = {"outputs": ""}
            self._run = torch.jit.load(str(path), _extra_files=extra)
            self._names = json.loads(extra["outputs"])

    def __call__(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for given in inputs:
            fields = dict(zip(self._names, self._run(given["image"].float())))
            height, width = fields.pop("image_size").tolist()
            fields["pred_boxes"] = Boxes(fields["pred_boxes"])
            instances = Instances((height, width), **fields)
            size = given.get("height", height), given.get("width", width)
            outputs.append({"instances": detector_postprocess(instances, *size)})
        return outputs
