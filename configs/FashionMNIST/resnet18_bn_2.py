from ..ImageNet.resnet50_bn_2 import model as _imagenet
from .common import dataloader, lr_multiplier, model, optimizer, train

model.stages.norm = _imagenet.stages.norm
model.norm_batch_size = 2
train.output_dir = "./output/fashion_mnist_resnet18_bn_2"
