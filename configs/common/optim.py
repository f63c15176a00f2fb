"""SGD as in the authors' release: all but the biases decay, and biases learn twice as fast."""

from detectron2 import model_zoo

SGD = model_zoo.get_config("common/optim.py").SGD
SGD.params.base_lr = "${..lr}"
SGD.params.weight_decay_norm = 1e-4
SGD.params.weight_decay_bias = 0.0
SGD.params.bias_lr_factor = 2.0
