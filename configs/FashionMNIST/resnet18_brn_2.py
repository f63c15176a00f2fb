from functools import partial

from mabn_d2.layers import BRN2d

from .common import GROUPS, dataloader, lr_multiplier, model, optimizer, per_group, train

# The bounds grow in the same parts of the schedule as on ImageNet: iterations 16 to 125, and to 78.
model.stages.norm = partial(
    BRN2d,
    momentum=per_group(0.01),
    r_max_iters=(16 * GROUPS, 125 * GROUPS),
    d_max_iters=(16 * GROUPS, 78 * GROUPS),
)
model.norm_batch_size = 2
train.output_dir = "./output/fashion_mnist_resnet18_brn_2"
