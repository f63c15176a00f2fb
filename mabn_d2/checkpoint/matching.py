"""Weights under the names, and in the sizes, of the model that takes them."""

from collections import Counter
from typing import NamedTuple

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..layers import RingBuffer
from ..layers.ring_buffer import adapt_ring_buffer
from .norms import foreign_norms, is_folded


class Matched(NamedTuple):
    """
    Attributes:
        state_dict: names of the model -> tensors, and what has no place in the model under its own name.
        ring_buffers: what was changed in the ring buffers of norms -> in how many.
        foreign_norms: as of :func:`foreign_norms`.
    """

    state_dict: dict[str, torch.Tensor]
    ring_buffers: Counter[str]
    foreign_norms: dict[tuple[str, str], list[str]]


def match_to_model(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    by_end: bool = False,
    caffe2: bool = False,
) -> Matched:
    """
    What Detectron2 is to load into a model: it passes over tensors of another shape, one by one, and of
    a ring buffer would load the count alone.

    Args:
        state_dict: it may be changed.
        by_end: whether the names may lack the first parts of the model's, which Detectron2 then finds.
        caffe2: whether the names are Caffe2's, which Detectron2 knows.
    """
    changes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, RingBuffer):
            prefix = f"{_name_in(state_dict, name) if by_end else name}."
            changes[adapt_ring_buffer(module, state_dict, prefix)] += 1
    del changes[""]
    ours = model.state_dict()
    folded = caffe2 and is_folded(state_dict)
    if by_end:
        state_dict = align_and_update_state_dicts(ours, state_dict, c2_conversion=caffe2)
    return Matched(state_dict, changes, foreign_norms(ours, state_dict, folded))


def _name_in(state_dict: dict[str, torch.Tensor], name: str) -> str:
    """A ring buffer's name where the first parts may lack; the longest one, as Detectron2 chooses."""
    end = name
    while end:
        if f"{end}.count" in state_dict or f"{end}.values" in state_dict:
            return end
        end = end.partition(".")[2]
    return name
