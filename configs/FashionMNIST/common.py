"""
ResNet-18 on Fashion-MNIST by the recipe of ../ImageNet/common.py, for one CPU core and ten minutes:
one worker's 32 images per iteration, one epoch, and an LR that is 8 times smaller as the batch is.

The backbone and the pixels are those of ../quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml.
"""

from detectron2.config import LazyCall as L
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

from mabn_d2.classification.data import FashionMNIST

from ..ImageNet.common import GROUPS, dataloader, lr_multiplier, model, optimizer, per_group, train

del model.stages.stride_in_1x1  # ResNet-18 has no 1x1 convolutions to put it in
model.stages.depth = 18
model.num_classes = 10
model.pixel_std = [57.375, 57.12, 58.395]

# Enlarged from 28x28, so that the last stage sees 2x2 pixels and two images have a variance there.
resize = L(Resize)(size=40)
dataloader.train.dataset = L(FashionMNIST)(
    split="train",
    transform=L(Compose)(
        transforms=[resize, L(RandomCrop)(size=40, padding=4), L(RandomHorizontalFlip)()]
    ),
)
dataloader.test.dataset = L(FashionMNIST)(split="val", transform=resize)
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = dataloader.test.num_workers = 0

optimizer.lr = 0.1 * 32 / 256

train.max_iter = 1875
train.checkpointer.period = 500
train.eval_period = 500
train.seed = 1
train.reference_world_size = 0
