from functools import partial

from mabn_d2.layers import MABN2d

from .common import GROUPS, dataloader, lr_multiplier, model, optimizer, per_group, train

# As in the release, the running statistic moves by 2 % per iteration, the batch's own statistics are
# used in the first iteration, and r = 1 in the first 100.
model.stages.norm = partial(
    MABN2d,
    momentum=per_group(0.02),
    buffer_size=16,
    warmup_iters=GROUPS,
    renorm_start_iter=100 * GROUPS,
)
model.norm_batch_size = 2
train.output_dir = "./output/imagenet_resnet50_mabn_2"
