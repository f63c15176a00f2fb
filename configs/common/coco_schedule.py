"""The paper's 2x schedule: Detectron2's, with the warm-up of maskrcnn-benchmark."""

from detectron2 import model_zoo

lr_multiplier_2x = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
lr_multiplier_2x.warmup_length = 500 / 180000
lr_multiplier_2x.warmup_factor = 1 / 3
