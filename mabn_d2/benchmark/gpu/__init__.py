"""
All that is to be measured on a GPU, most wanted first, in stages of a few minutes.

A stage writes a CSV file row by row, and measures what the file lacks.
"""

from ...utils import needs_detectron2  # noqa: F401
from . import accuracy, correct, inference, layers, training, workers
from .stage import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (correct, layers, training, inference, workers, accuracy)
}
