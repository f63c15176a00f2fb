from ..common.coco_schedule import lr_multiplier_2x as lr_multiplier
from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_fpn import model
from ..common.optim import SGD as optimizer
from ..common.train import train

model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "MABN"
model.backbone.norm = "MABN"
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "MABN"
train.init_checkpoint = ""
