from .common import dataloader, lr_multiplier, model, optimizer, train

# Each group of 2 images is remembered as a mini-batch, as the 2 images of a GPU are in detection.
model.stages.norm = "MBN"
model.norm_batch_size = 2
train.double_forward = True
train.output_dir = "./output/imagenet_resnet50_mbn_2"
