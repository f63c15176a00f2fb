"""The backbone of ../quick_schedules/Base-Shapes-MaskRCNN-R26-FPN.yaml on Fashion-MNIST: `model.stem.norm=MABN`."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from ..FashionMNIST.common import dataloader, lr_multiplier, model, optimizer, train

model.stem.norm = "BN"
model.stem.out_channels = 32
model.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=2,
        stride_per_block=[min(index + 1, 2), 1],
        in_channels=32 * 2**index,
        bottleneck_channels=32 * 2**index,
        out_channels=64 * 2**index,
        stride_in_1x1=True,
        norm="${model.stem.norm}",
    )
    for index in range(4)
]
train.output_dir = "./output/fashion_mnist_resnet26"
