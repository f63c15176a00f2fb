from .common import train

train.output_dir = "./output/fashion_mnist_resnet18_bn"
