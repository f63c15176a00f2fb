from functools import partial

from mabn_d2.layers import BRN2d

from .common import GROUPS, dataloader, lr_multiplier, model, optimizer, per_group, train

# The schedule of BRN's paper: r from 5k to 40k iterations, d from 5k to 25k.
model.stages.norm = partial(
    BRN2d,
    momentum=per_group(0.01),
    r_max_iters=(5000 * GROUPS, 40000 * GROUPS),
    d_max_iters=(5000 * GROUPS, 25000 * GROUPS),
)
model.norm_batch_size = 2
train.output_dir = "./output/imagenet_resnet50_brn_2"
