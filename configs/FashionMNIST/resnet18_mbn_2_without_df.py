from .resnet18_mbn_2 import dataloader, lr_multiplier, model, optimizer, train

train.double_forward = False
train.output_dir = "./output/fashion_mnist_resnet18_mbn_2_without_df"
