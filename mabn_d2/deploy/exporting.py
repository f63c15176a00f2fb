"""Writes a detector of Detectron2 as TorchScript or ONNX."""

import inspect
import json
import os
import warnings
from collections.abc import Callable
from typing import IO, Any

import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.structures import Boxes, Instances
from torch import nn

from ..surgery import fold
from ..utils.files import atomic_write

ONNX_OPSET = 16  # the first with RoIAlign's half-pixel grid, which Detectron2 uses


def export_detector(
    model: nn.Module, path: str | os.PathLike, format: str, image: torch.Tensor
) -> None:
    """
    Folds a detector and writes it to a file that takes an image and gives its detections.

    The file holds the preprocessing, the network and the selection of detections. Boxes are in pixels of
    the image that it is given, masks are 28x28 scores in their box. The image may be of any size.

    A scripted model takes and gives a list of dicts, one per image. The others take one image and give the
    tensors `pred_boxes`, `pred_classes`, `pred_masks` if there are any, `scores` and `image_size`.

    Args:
        model: Detectron2's `GeneralizedRCNN` or `RetinaNet`, on the CPU.
        path: of the file.
        format: one of `FORMATS`.
        image: an example, float of shape (3, H, W) in 0..255, in the order of channels that the model takes.

    Raises:
        ValueError: the model or the format is another.
    """
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)):
        raise ValueError(
            f"{type(model).__name__} cannot be exported, accepted are GeneralizedRCNN and RetinaNet"
        )
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is not known, accepted are {', '.join(FORMATS)}")
    with atomic_write(os.fspath(path)) as file, torch.no_grad(), warnings.catch_warnings():
        # Of Detectron2's assertions and of numbers that are the same for every image.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        FORMATS[format](fold(model), file, image)


def _detections(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> list[Instances]:
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    return [output["instances"] for output in model(inputs)]


def _traceable(model: nn.Module, image: torch.Tensor) -> tuple[nn.Module, list[str]]:
    """A module from an image to tensors, and their names."""
    adapter = TracingAdapter(model, [{"image": image}], _detections).eval()
    (detections,) = _detections(model, [{"image": image}])
    return adapter, [*sorted(detections.get_fields()), "image_size"]


def _trace(model: nn.Module, file: IO[bytes], image: torch.Tensor) -> None:
    adapter, names = _traceable(model, image)
    traced = torch.jit.trace(adapter, (image,), check_trace=False)
    torch.jit.save(traced, file, _extra_files={"outputs": json.dumps(names)})


def _onnx(model: nn.Module, file: IO[bytes], image: torch.Tensor) -> None:
    adapter, names = _traceable(model, image)
    sizes = {name: {0: "detections"} for name in names if name != "image_size"}
    options: dict[str, Any] = {"dynamic_axes": {"image": {1: "height", 2: "width"}, **sizes}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # the other exporter does not know torchvision's operators
    torch.onnx.export(
        adapter, (image,), file, opset_version=ONNX_OPSET, input_names=["image"],
        output_names=names, **options,
    )  # fmt: skip


class _ScriptableRCNN(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, inputs: tuple[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        instances = self.model.inference(inputs, do_postprocess=False)
        return [i.get_fields() for i in instances]


class _ScriptableRetinaNet(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, inputs: tuple[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        # Of a scripted model the outputs are instances, not dicts with them.
        return [instances.get_fields() for instances in self.model(inputs)]


def _script(model: nn.Module, file: IO[bytes], image: torch.Tensor) -> None:
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    is_rcnn = isinstance(model, GeneralizedRCNN)
    scriptable = _ScriptableRCNN(model) if is_rcnn else _ScriptableRetinaNet(model)
    torch.jit.save(scripting_with_instances(scriptable, fields), file)


FORMATS: dict[str, Callable[[nn.Module, IO[bytes], torch.Tensor], None]] = {
    "onnx": _onnx,
    "tracing": _trace,
    "scripting": _script,
}
