"""The config of a finished run, and its model in words."""

import os

from detectron2.config import CfgNode

from ..plugin.config import load_config


def read_config(output_dir: str) -> CfgNode:
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: it is written when training starts")
    return load_config(path)


def describe_model(cfg: CfgNode) -> str:
    """Architecture and norms in words, like "Mask R-CNN R18-FPN, norm MABN"."""
    model = cfg.MODEL
    name = model.META_ARCHITECTURE
    if name == "GeneralizedRCNN":
        kinds = (model.MASK_ON, "Mask"), (model.KEYPOINT_ON, "Keypoint"), (True, "Faster")
        name = next(kind for on, kind in kinds if on) + " R-CNN"
    if "resnet" in model.BACKBONE.NAME:
        name += f" R{model.RESNETS.DEPTH}" + "-FPN" * ("fpn" in model.BACKBONE.NAME)
    norms = [model.RESNETS.NORM]
    if "fpn" in model.BACKBONE.NAME:
        norms.append(model.FPN.NORM)
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        norms.append(model.ROI_BOX_HEAD.NORM)
        norms += [model.ROI_MASK_HEAD.NORM] * model.MASK_ON
    return f"{name}, norm {' / '.join(dict.fromkeys(norm or 'none' for norm in norms))}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
