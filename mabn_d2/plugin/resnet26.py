"""The backbone of the small experiments: shallow, and as thin as `MODEL.RESNETS` says."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet

_BLOCKS = 2  # bottleneck blocks in each of four stages


@BACKBONE_REGISTRY.register()
def build_resnet26_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    FPN on a ResNet of 26 layers, two bottleneck blocks in each stage.

    Detectron2's own builders know a ResNet-50 and deeper, and one of 18 and 34 layers that cannot be thin.

    Args:
        cfg: `MODEL.FPN`, and of `MODEL.RESNETS` what describes the stem, the widths, `OUT_FEATURES`,
            `STRIDE_IN_1X1` and `NORM`. The rest is for other networks.
        input_shape: of the images; its channels.
    """
    resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
    stages = []
    channels = resnets.STEM_OUT_CHANNELS
    for index in range(4):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                _BLOCKS,
                stride_per_block=[min(index + 1, 2)] + [1] * (_BLOCKS - 1),
                in_channels=channels,
                bottleneck_channels=resnets.WIDTH_PER_GROUP * 2**index,
                out_channels=out_channels,
                stride_in_1x1=resnets.STRIDE_IN_1X1,
                norm=resnets.NORM,
            )
        )
        channels = out_channels
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=resnets.OUT_FEATURES),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )
