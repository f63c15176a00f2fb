"""
ResNet-50 on ImageNet as in the MABN paper (ICLR 2020) and its authors' release, `cls/`: 8 workers x 32
images, 600k iterations, no warm-up.

A file that imports this one states which norm it uses, and on how many images at a time.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from torch.optim import SGD
from torchvision.transforms import (
    CenterCrop,
    Compose,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)

from mabn_d2.classification import AccuracyEvaluator, Classifier
from mabn_d2.classification.data import (
    ClassificationTrainLoader,
    ImageNet,
    build_classification_test_loader,
)

# Of a worker's 32 images, normalized 2 at a time. The norms count and average in these groups.
GROUPS = 16


def per_group(momentum):
    """The momentum whose steps over all groups amount to one step of the given momentum."""
    return 1 - (1 - momentum) ** (1 / GROUPS)


model = L(Classifier)(
    # The stride of the detectors in configs/COCO-InstanceSegmentation, which is that of the authors'
    # detector. Their classifier strides in the 3x3 convolution (docs/weights.md).
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="BN"),
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="${..stages.norm}"),
    num_classes=1000,
    label_smoothing=0.1,
    # Those of the detectors too (configs/Base-MaskRCNN-R50-FPN-2x.yaml).
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    norm_batch_size=0,
)

dataloader = OmegaConf.create()
dataloader.train = L(ClassificationTrainLoader)(
    dataset=L(ImageNet)(
        split="train",
        transform=L(Compose)(
            transforms=[L(RandomResizedCrop)(size=224), L(RandomHorizontalFlip)()]
        ),
    ),
    total_batch_size=256,
    num_workers=8,
)
dataloader.test = L(build_classification_test_loader)(
    dataset=L(ImageNet)(
        split="val",
        transform=L(Compose)(transforms=[L(Resize)(size=256), L(CenterCrop)(size=224)]),
    ),
    batch_size=200,
    num_workers=8,
)
dataloader.evaluator = L(AccuracyEvaluator)()

# Without arguments, all parameters decay alike, biases and norms included.
optimizer = L(SGD)(
    params=L(get_default_optimizer_params)(), lr=0.1, momentum=0.9, weight_decay=1e-4
)
# Four equal parts.
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1, 0.01, 0.001], num_updates="${train.max_iter}"
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 600000
train.checkpointer.period = 10000
train.eval_period = 50000
train.reference_world_size = 8
