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
_RING_BUFFERS = ("psi", "second_moment", "memory")
_PER_LEVEL = " per feature level"


def norms_of(state_dict: StateDict) -> dict[str, str]:
    """
    The norms of a state dict.

    Returns:
        name of the module -> 'MABN', 'MBN', 'BN' for all that have its running statistics (FrozenBN,
        SyncBN, BRN), or 'GN' for all that have affine parameters alone (LN); with ' per feature level'
        where it is a list of them that share affine parameters.
    """
    entries = defaultdict(set)
    for key, value in state_dict.items():
        name, entry = _split(key)
        if entry == "weight" and value.dim() != 1:
            entry = "kernel"
        entries[name].add(entry)
    lists = set()
    for name in list(entries):
        shared, _, level = name.rpartition(".")
        if level.isdigit() and "weight" in entries.get(shared, ()):
            entries[shared] |= entries.pop(name)
            lists.add(shared)
    norms = {}
    for name, found in entries.items():
        told_by = next((entry for entry in _TOLD_BY if entry in found), None)
        if told_by and "kernel" not in found and (told_by != "weight" or "bias" in found):
            norms[name] = _TOLD_BY[told_by] + (_PER_LEVEL if name in lists else "")
    return norms


def _function(norm: str) -> str:
    """BN, FrozenBN, SyncBN, BRN and MBN differ in training and are one function in evaluation."""
    return re.sub("^(MBN|folded BN)", "BN", norm)


def _split(key: str) -> tuple[str, str]:
    """`conv1.norm.psi.count` -> (`conv1.norm`, `psi.count`)."""
    entry = re.search(r"((?:psi|second_moment|memory)\.)?[^.]+$", key)[0]  # type: ignore[index]
    return key[: -len(entry)].rstrip("."), entry


def norm_of(state_dict: StateDict) -> str:
    """The norm of a whole state dict: the first of 'MABN', 'MBN', 'BN' and 'GN' that it has, or ''."""
    found = {norm.removesuffix(_PER_LEVEL) for norm in norms_of(state_dict).values()}
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
    shared = model.keys() & state_dict.keys()
    # A norm without a counterpart counts where something beside it is loaded.
    beside = {ancestor for key in shared for ancestor in _ancestors(_split(key)[0], ours)}
    # A new norm with running statistics is the identity: what counts is the bias that it replaces.
    biases = {key for key in state_dict.keys() - model.keys() if key.endswith(".bias")}
    unbiased = {_split(key)[0] for key in biases if f"{_split(key)[0]}.weight" in shared}
    unbiased |= {name.rpartition(".")[0] for name in unbiased}
    foreign = defaultdict(list)
    for name in dict.fromkeys([*ours, *theirs]):
        pair = theirs.get(name, ""), ours.get(name, "")
        near = unbiased if not pair[0] and _function(pair[1]).startswith("BN") else beside
        is_loaded = all(pair) or name.rpartition(".")[0] in near
        if is_loaded and _function(pair[0]) != _function(pair[1]):
            foreign[pair].append(name)
    return dict(foreign)


def _ancestors(name: str, norms: Mapping[str, str]) -> list[str]:
    """A module and those that it is in; none of a norm."""
    ancestors = []
    while name not in norms:
        ancestors.append(name)
        if not name:
            break
        name = name.rpartition(".")[0]
    return ancestors
