"""Code bases whose weights can be converted, one file each."""

from .detectron2 import convert_detectron2
from .release import convert_release
from .torchvision import convert_torchvision
from .weights import Weights

__all__ = ["Weights", "convert_detectron2", "convert_release", "convert_torchvision"]
