"""Checkpoints, and other people's weights as ours."""

from ..utils import needs_detectron2  # noqa: F401
from .checkpointer import WEIGHTS_IMPORT, Checkpointer, last_checkpoint
from .convert import SOURCES, as_norm, check_destination, load_weights, save_weights
from .describe import Match, config_lines, describe, match_model
from .reading import read_checkpoint
from .sources import Weights

__all__ = [
    "SOURCES",
    "WEIGHTS_IMPORT",
    "Checkpointer",
    "Match",
    "Weights",
    "as_norm",
    "check_destination",
    "config_lines",
    "describe",
    "last_checkpoint",
    "load_weights",
    "match_model",
    "read_checkpoint",
    "save_weights",
]
