"""The architectures of Detectron2: its model zoo, its projects, and backbones that no config uses."""

import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyCall, get_cfg
from detectron2.modeling.backbone.regnet import (
    AnyNet,
    RegNet,
    ResBasicBlock,
    ResStem,
    SimpleStem,
    VanillaBlock,
)
from detectron2.modeling.backbone.vit import ResBottleneckBlock
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from .models import (
    SIZE,
    build,
    items,
    set_keys,
    set_where_present,
)


def list_zoo():
    """All configs of the zoo but copies with another schedule and models of other packages."""
    zoo = Path(model_zoo.__file__).parent / "configs"
    names = sorted(str(path.relative_to(zoo)) for path in zoo.rglob("*.yaml"))
    for folder in ("common/models", "COCO-*", "new_baselines"):
        names += sorted(str(path.relative_to(zoo)) for path in zoo.glob(f"{folder}/*.py"))
    names = [name for name in names if not re.search("quick_schedules|[24]00ep|vitdet", name)]
    shorter = {name: re.sub("_[39]x", "_1x", name) for name in names}
    return [name for name in names if shorter[name] == name or shorter[name] not in names]


def mask_rcnn_resnet18():
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    set_keys(cfg.MODEL.RESNETS, DEPTH=18, RES2_OUT_CHANNELS=64)
    return cfg


def mask_rcnn_modulated_deformable():
    cfg = model_zoo.get_config("Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml")
    set_keys(cfg.MODEL.RESNETS, DEFORM_MODULATED=True)
    return cfg


def deeplab(**overrides):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    set_keys(
        cfg.MODEL.RESNETS,
        OUT_FEATURES=["res2", "res3", "res5"],
        STRIDE_IN_1X1=False,
        RES5_DILATION=2,
    )
    set_keys(
        cfg.MODEL.SEM_SEG_HEAD,
        NAME="DeepLabV3PlusHead",
        IN_FEATURES=["res2", "res5"],
        NUM_CLASSES=19,
        CONVS_DIM=256,
    )
    set_keys(cfg.MODEL.SEM_SEG_HEAD, **overrides)
    return cfg


def deeplab_v3():
    return deeplab(NAME="DeepLabV3Head", IN_FEATURES=["res5"], COMMON_STRIDE=16)


def deeplab_v3plus():
    return deeplab()


def deeplab_v3plus_depthwise_separable():
    return deeplab(USE_DEPTHWISE_SEPARABLE_CONV=True)


def import_panoptic_deeplab():
    """Its data mapper imports panopticapi, which the model does without."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("panopticapi") is None:
            stand_in = types.ModuleType("panopticapi.utils")
            stand_in.rgb2id = None
            patch.setitem(sys.modules, "panopticapi", types.ModuleType("panopticapi"))
            patch.setitem(sys.modules, "panopticapi.utils", stand_in)
        return importlib.import_module("detectron2.projects.panoptic_deeplab")


def panoptic_deeplab():
    cfg = get_cfg()
    import_panoptic_deeplab().add_panoptic_deeplab_config(cfg)
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic",)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    set_keys(
        cfg.MODEL.RESNETS,
        OUT_FEATURES=["res2", "res3", "res5"],
        STRIDE_IN_1X1=False,
        RES5_DILATION=2,
    )
    set_keys(
        cfg.MODEL.SEM_SEG_HEAD,
        NAME="PanopticDeepLabSemSegHead",
        IN_FEATURES=["res2", "res3", "res5"],
        PROJECT_FEATURES=["res2", "res3"],
        PROJECT_CHANNELS=[32, 64],
        NUM_CLASSES=19,
        CONVS_DIM=256,
    )
    return cfg


def panoptic_deeplab_depthwise_separable():
    cfg = panoptic_deeplab()
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = True
    cfg.MODEL.PANOPTIC_DEEPLAB.USE_DEPTHWISE_SEPARABLE_CONV = True
    return cfg


def pointrend_instances():
    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(
        model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    )
    cfg.MODEL.ROI_HEADS.NAME = "PointRendROIHeads"
    set_keys(cfg.MODEL.ROI_MASK_HEAD, NAME="PointRendMaskHead", POOLER_TYPE="", POINT_HEAD_ON=True)
    return cfg


def pointrend_semantic():
    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Misc/semantic_R_50_FPN_1x.yaml"))
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return cfg


def vitdet_on_resnet():
    """ViTDet's pyramid and heads. Its ViT has no convolutions with a norm, and needs timm."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    resnet = model_zoo.get_config("common/models/mask_rcnn_c4.py").model.backbone
    set_keys(model.backbone, net=resnet, in_feature="res4", square_pad=SIZE)
    return model


def regnet_of_basic_blocks():
    return LazyCall(RegNet)(
        stem_class=ResStem,
        stem_width=8,
        block_class=ResBasicBlock,
        depth=6,
        w_a=8,
        w_0=8,
        w_m=2,
        group_width=8,
    )


def anynet_of_vanilla_blocks():
    return LazyCall(AnyNet)(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=VanillaBlock,
        depths=[2, 1],
        widths=[8, 16],
        group_widths=[8, 8],
        strides=[2, 2],
        bottleneck_ratios=[1.0, 1.0],
        se_ratio=0.0,
        activation_class=nn.ReLU,
    )


def vit_residual_block():
    return LazyCall(ResBottleneckBlock)(in_channels=8, out_channels=8, bottleneck_channels=4)


OTHER_ARCHITECTURES = [
    mask_rcnn_resnet18,
    mask_rcnn_modulated_deformable,
    deeplab_v3,
    deeplab_v3plus,
    deeplab_v3plus_depthwise_separable,
    panoptic_deeplab,
    panoptic_deeplab_depthwise_separable,
    pointrend_instances,
    pointrend_semantic,
    vitdet_on_resnet,
]
BACKBONES = [regnet_of_basic_blocks, anynet_of_vanilla_blocks, vit_residual_block]


def name_of(architecture):
    return getattr(architecture, "__name__", architecture)


def load(architecture):
    """
    Args:
        architecture: a file of the zoo, or a function that returns a config.

    Returns:
        a CfgNode, or the lazy config of a model.
    """
    if callable(architecture):
        return architecture()
    config = model_zoo.get_config(architecture)
    return config if isinstance(config, CfgNode) else config.model


def add_absent_norms(config):
    """Spells out the norm arguments that a lazy config leaves at their default values."""
    if isinstance(config, DictConfig) and "_target_" in config:
        target = config["_target_"]
        signature = inspect.signature(locate(target) if isinstance(target, str) else target)
        for name in {"norm", "conv_norm"} & set(signature.parameters) - set(config):
            config[name] = ""
    for _, value in items(config):
        add_absent_norms(value)


def build_with(config, norm):
    """A model with the given norm in each place where its config takes the name of one."""
    return build(set_norm(config, norm))


def set_norm(config, norm):
    add_absent_norms(config)
    set_where_present(config, {"NORM": norm, "norm": norm, "conv_norm": norm})
    return config


def shrink(config):
    """A narrow model with few proposals and no frozen layers, for a fast training step."""
    if isinstance(config, CfgNode):
        values = {
            "DEVICE": "cpu",
            "FREEZE_AT": 0,
            "STEM_OUT_CHANNELS": 16,
            "RES2_OUT_CHANNELS": 32 if config.MODEL.RESNETS.DEPTH >= 50 else 64,
            "WIDTH_PER_GROUP": 8 if config.MODEL.RESNETS.NUM_GROUPS == 1 else 1,
            "OUT_CHANNELS": 16,
            "CONV_DIM": 16,
            "FC_DIM": 16,
            "CONV_DIMS": [16, 16],
            "CONVS_DIM": 16,
            "ASPP_CHANNELS": 16,
            "HEAD_CHANNELS": 16,
            "NUM_CLASSES": 3,
            "BATCH_SIZE_PER_IMAGE": 8,
            "POST_NMS_TOPK_TRAIN": 20,
        }
    else:
        values = {
            "freeze_at": 0,
            "num_classes": 3,
            "batch_size_per_image": 8,
            "post_nms_topk": (20, 20),
            "fc_dims": [1024],
        }
    set_where_present(config, values)
    return config
