"""Weights under the names, and in the sizes, of the model that takes them."""

from collections import Counter
from typing import NamedTuple

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..layers import RingBuffer
from ..layers.ring_buffer import adapt_ring_buffer
from ..surgery.sites import find_norm_sites, num_channels
from ..surgery.weights import Imported, has_statistics, import_state_dict
from .norms import foreign_norms, is_folded


class Matched(NamedTuple):
    """
    Attributes:
        state_dict: names of the model -> tensors, and what has no place in the model under its own name.
        ring_buffers: what was changed in the ring buffers of norms -> in how many.
        foreign_norms: as of :func:`foreign_norms`, but for the norms that were imported.
        imported: as of :func:`import_state_dict`; None where it was not asked for.
    """

    state_dict: dict[str, torch.Tensor]
    ring_buffers: Counter[str]
    foreign_norms: dict[tuple[str, str], list[str]]
    imported: Imported | None = None


def match_to_model(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    by_end: bool = False,
    caffe2: bool = False,
    exact: bool = False,
) -> Matched:
    """
    What Detectron2 is to load into a model: it passes over tensors of another shape, one by one, and of
    a ring buffer would load the count alone.

    Args:
        state_dict: it may be changed.
        by_end: whether the names may lack the first parts of the model's, which Detectron2 then finds.
        caffe2: whether the names are Caffe2's, which Detectron2 knows.
        exact: whether norms take over the function of other norms.
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
        names = {**_names_of_others(model), **ours} if exact else ours
        state_dict = align_and_update_state_dicts(names, state_dict, c2_conversion=caffe2)
    foreign = foreign_norms(ours, state_dict, folded)
    if not exact:
        return Matched(state_dict, changes, foreign)
    imported = import_state_dict(model, state_dict, folded=folded)
    kept = {*imported.with_statistics, *imported.affine}
    foreign = {
        pair: [name for name in names if name not in kept] for pair, names in foreign.items()
    }
    foreign = {pair: names for pair, names in foreign.items() if names}
    return Matched(imported.state_dict, changes, foreign, imported)


def _names_of_others(model: nn.Module) -> dict[str, torch.Tensor]:
    """What other norms have that the model's do not: so that Detectron2 finds the place for it, too."""
    names = {}
    for site in find_norm_sites(model, has_statistics):
        channels = torch.empty(num_channels(site.norm), device="meta")
        if site.convolution is not None:
            names[f"{site.convolution_name}.bias"] = channels
            names[f"{site.convolution_name}.kernel_mean"] = channels[:, None, None, None]
        names[f"{site.norm_name}.psi.count"] = names[f"{site.norm_name}.memory.count"] = channels[0]
    return names


def _name_in(state_dict: dict[str, torch.Tensor], name: str) -> str:
    """A ring buffer's name where the first parts may lack; the longest one, as Detectron2 chooses."""
    end = name
    while end:
        if f"{end}.count" in state_dict or f"{end}.values" in state_dict:
            return end
        end = end.partition(".")[2]
    return name
