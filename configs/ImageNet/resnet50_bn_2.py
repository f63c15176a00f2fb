from functools import partial

from torch.nn import BatchNorm2d

from .common import dataloader, lr_multiplier, model, optimizer, per_group, train

model.stages.norm = partial(BatchNorm2d, momentum=per_group(0.1))
model.norm_batch_size = 2
train.output_dir = "./output/imagenet_resnet50_bn_2"
