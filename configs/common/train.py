"""From scratch for 180k iterations with 8 workers, evaluated at the end."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.max_iter = 180000
train.eval_period = 0
train.reference_world_size = 8
