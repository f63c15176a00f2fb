"""The config of a finished run, and its model in words."""

import os

from detectron2.config import CfgNode, get_cfg

from ..plugin.config import add_mabn_config


def read_config(output_dir: str) -> CfgNode:
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: it is written when training starts")
    cfg = get_cfg()
    add_mabn_config(cfg)
    try:
        cfg.merge_from_file(path)
    except Exception as e:  # of many types: wrong syntax, unknown keys, values of another type
        raise ValueError(f"{path} is not the config of a run: {e}") from e
    return cfg


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
