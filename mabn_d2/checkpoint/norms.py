"""With which norms weights were trained, told by their names, and where a model has others."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

StateDict = Mapping[str, torch.Tensor]

# An entry of a norm's state -> the norm; the first that is there tells. The release's MABN has `iters`.
_TOLD_BY = {
    "psi.count": "MABN",
    "iters": "MABN",
    "memory.count": "MBN",
    "running_mean": "BN",
    "running_var": "MABN",
    "weight": "GN",
}
# BN, FrozenBN, SyncBN, BRN and MBN have other statistics in training and are one function in evaluation.
_SAME_FUNCTION = ({"BN", "MBN"}, {"BN", "folded BN"}, {"MBN", "folded BN"})


def norms_of(state_dict: StateDict) -> dict[str, str]:
    """
    The norms of a state dict.

    Returns:
        name of the module -> 'MABN', 'MBN', 'BN' for all that have its running statistics (FrozenBN,
        SyncBN, BRN), or 'GN' for all that have affine parameters alone (LN).
    """
    entries = defaultdict(set)
    for key, value in state_dict.items():
        name, entry = _split(key)
        if entry == "weight" and value.dim() != 1:
            entry = "kernel"
        entries[name].add(entry)
    for name in list(entries):  # norms per feature level, which share affine parameters
        shared, _, level = name.rpartition(".")
        if level.isdigit() and "weight" in entries.get(shared, ()):
            entries[shared] |= entries.pop(name)
    norms = {}
    for name, found in entries.items():
        told_by = next((entry for entry in _TOLD_BY if entry in found), None)
        if told_by and "kernel" not in found and (told_by != "weight" or "bias" in found):
            norms[name] = _TOLD_BY[told_by]
    return norms


def _split(key: str) -> tuple[str, str]:
    """`conv1.norm.psi.count` -> (`conv1.norm`, `psi.count`)."""
    entry = re.search(r"((?:psi|second_moment|memory)\.)?[^.]+$", key)[0]
    return key[: -len(entry)].rstrip("."), entry


def norm_of(state_dict: StateDict) -> str:
    """The norm of a whole state dict: the first of 'MABN', 'MBN', 'BN' and 'GN' that it has, or ''."""
    found = set(norms_of(state_dict).values())
    if any("_bn_" in key for key in state_dict):  # Caffe2's names
        found.add("BN")
    return next((norm for norm in _TOLD_BY.values() if norm in found), "")


def is_folded(state_dict: StateDict) -> bool:
    """Whether these are Caffe2's weights of BN, which is folded into an affine map: no statistics."""
    return any(key.endswith("_bn_s") for key in state_dict)


def foreign_norms(
    model: StateDict, state_dict: StateDict, folded: bool = False
) -> dict[tuple[str, str], list[str]]:
    """
    The norms that compute another function in evaluation than in the network that was trained.

    Args:
        model: the state dict of the model that takes the weights.
        state_dict: the weights, under the model's names.
        folded: whether affine parameters without statistics are those of a folded BN.

    Returns:
        (norm of the weights, norm of the model), '' for none -> names of the modules.
    """
    ours, theirs = norms_of(model), norms_of(state_dict)
    if folded:
        theirs = {name: "folded BN" if norm == "GN" else norm for name, norm in theirs.items()}
    # A norm without a counterpart counts where what is around it is loaded.
    around = {""} if model.keys() & state_dict.keys() else set()
    for key in model.keys() & state_dict.keys():
        name, _ = _split(key)
        while name and name not in ours:
            around.add(name)
            name = name.rpartition(".")[0]
    foreign = defaultdict(list)
    for name in dict.fromkeys([*ours, *theirs]):
        pair = theirs.get(name, ""), ours.get(name, "")
        is_loaded = all(pair) or name.rpartition(".")[0] in around
        if is_loaded and pair[0] != pair[1] and set(pair) not in _SAME_FUNCTION:
            foreign[pair].append(name)
    return dict(foreign)
