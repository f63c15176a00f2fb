"""From scratch for 180k iterations, evaluated at the end."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.max_iter = 180000
train.eval_period = 0
