"""A ResNet-FPN that a CPU core trains to convergence in minutes."""

import os

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet

BLOCKS = tuple(int(x) for x in os.environ.get("BLOCKS", "2,2,2,2").split(","))


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    options = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, options.STEM_OUT_CHANNELS, options.NORM)
    width, in_channels, out_channels = (
        options.WIDTH_PER_GROUP,
        options.STEM_OUT_CHANNELS,
        options.RES2_OUT_CHANNELS,
    )
    stages = []
    for index, blocks in enumerate(BLOCKS):
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                bottleneck_channels=width,
                stride_in_1x1=options.STRIDE_IN_1X1,
                norm=options.NORM,
            )
        )
        in_channels, out_channels, width = out_channels, 2 * out_channels, 2 * width
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=options.OUT_FEATURES),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool() if os.environ.get("TOP") else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
