from .common import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/fashion_mnist_resnet18_bn"
