from .common import dataloader, lr_multiplier, model, optimizer, train

model.stages.norm = "MBN"
model.norm_batch_size = 2
train.double_forward = True
train.output_dir = "./output/fashion_mnist_resnet18_mbn_2"
