"""The classifier that pre-trains a backbone, its accuracy and its data."""

from ..utils import needs_detectron2  # noqa: F401
from .evaluator import AccuracyEvaluator
from .model import Classifier

__all__ = ["AccuracyEvaluator", "Classifier"]
