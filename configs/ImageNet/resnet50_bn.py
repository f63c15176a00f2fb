from .common import dataloader, lr_multiplier, model, optimizer, train

# BN over the 32 images of a worker.
train.output_dir = "./output/imagenet_resnet50_bn"
