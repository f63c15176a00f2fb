"""Detectron2 models of any architecture, fast to build or to run a training step of."""

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig

from mabn_d2.plugin import load_config
from mabn_d2.training import norm_statistics

from . import INSTANT

SIZE = 64  # pixels of the images of a training step


def set_keys(node, **values):
    for key, value in values.items():
        assert key in node
        node[key] = value


def items(config):
    """Pairs (key, value) of a node of either kind of config; none of a leaf."""
    if isinstance(config, ListConfig):
        return list(enumerate(config))
    return [(k, config[k]) for k in config] if isinstance(config, (CfgNode, DictConfig)) else []


def set_where_present(config, values):
    """Sets the keys wherever in a config they occur."""
    for key, value in items(config):
        if key in values:
            config[key] = values[key]
        else:
            set_where_present(value, values)


def build(config):
    """
    Args:
        config: a CfgNode, or the lazy config of a model.
    """
    return build_model(config) if isinstance(config, CfgNode) else instantiate(config)


def build_for_inspection(config):
    """On PyTorch's meta device: without memory, and in no time."""
    if isinstance(config, CfgNode):
        config.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build(config)


def random_inputs(classes=(0, 2)):
    """Two images with the ground truth of every task, in the format of Detectron2's mappers."""
    boxes = torch.tensor([[4.0, 4.0, 36.0, 40.0], [20.0, 16.0, 60.0, 60.0]])
    inside = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(inside, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    inputs = []
    for _ in range(2):
        instances = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.tensor(classes)
        instances.gt_masks = BitMasks(inside)
        points = boxes[:, None, :2] + 16 * torch.rand(2, 17, 2)
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 17, 1), 2.0)], dim=2))
        proposals = Instances((SIZE, SIZE), proposal_boxes=Boxes(boxes + 2))
        proposals.objectness_logits = torch.ones(2)
        inputs.append(
            {
                "image": torch.randint(0, 256, (3, SIZE, SIZE)).float(),
                "instances": instances,
                "proposals": proposals,
                "sem_seg": torch.randint(0, 3, (SIZE, SIZE)),
                "center": torch.rand(SIZE, SIZE),
                "center_weights": torch.ones(SIZE, SIZE),
                "offset": torch.randn(2, SIZE, SIZE),
                "offset_weights": torch.ones(SIZE, SIZE),
            }
        )
    return inputs


def train_step(model, classes=(0, 2)):
    """Forward and backward; returns the losses."""
    with EventStorage():
        losses = model.train()(random_inputs(classes))
    sum(losses.values()).backward()
    return losses


def small_cfg(norm="MABN", *options):
    """Of a Mask R-CNN that has the norm everywhere."""
    cfg = load_config(str(INSTANT))
    for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[key].NORM = norm
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(options))
    return cfg


def statistics(model):
    """Copies of all statistics of its norms."""
    return [s.clone() for s in norm_statistics(model)]


def decays(optimizer_or_groups, model):
    """Weight decay by the name of the parameter."""
    groups = getattr(optimizer_or_groups, "param_groups", optimizer_or_groups)
    by_parameter = {p: g.get("weight_decay") for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(by_parameter)
    return {name: by_parameter[p] for name, p in model.named_parameters() if p.requires_grad}
