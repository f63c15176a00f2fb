"""
ResNet-18 on Fashion-MNIST as in ../FashionMNIST, with any norm on any part of the 32 images of an iteration:
`model.stages.norm.name=MABN model.norm_batch_size=4`.
"""

from detectron2.config import LazyCall as L

from mabn_d2.study.grouped_norm import grouped_norm

from ..FashionMNIST.common import dataloader, lr_multiplier, model, optimizer, train

model.stages.norm = L(grouped_norm)(
    name="BN",
    images="${dataloader.train.total_batch_size}",
    norm_batch="${model.norm_batch_size}",
)
train.output_dir = "./output/fashion_mnist_study"
