"""What a conversion of weights did, for people to read."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .matching import match_to_model
from .sources.weights import Weights, merge


class Match(NamedTuple):
    """How weights fit a model: names of the model's tensors, and of the file's that fit none."""

    matched: list[str]
    missing: list[str]
    left_over: list[str]


def match_model(weights: Weights, cfg: CfgNode) -> Match:
    """What the model of a config takes from the weights, matched as :class:`Checkpointer` does."""
    module = build_model(cfg)
    model = module.state_dict()
    heuristics, caffe2 = weights.matching_heuristics, weights.author == "Caffe2"
    theirs = match_to_model(module, dict(weights.state_dict), heuristics, caffe2).state_dict
    matched = {k: theirs[k] for k, v in model.items() if k in theirs and theirs[k].shape == v.shape}
    missing = module.load_state_dict(matched, strict=False).missing_keys
    return Match(list(matched), missing, [key for key in theirs if key not in matched])


def _grouped(keys: Iterable[str]) -> list[str]:
    """`a.norm.bias`, `a.norm.psi.count` -> `a.norm.{bias, psi.count}`: one line for each module."""
    modules: dict[str, list[str]] = {}
    for key in keys:
        parts = re.fullmatch(r"(.+?)\.((?:(?:psi|second_moment)\.)?[^.]+)", key)
        module, tensor = parts.groups() if parts else ("", key)
        modules.setdefault(module, []).append(tensor)
    return [
        f"{module}.{{{', '.join(names)}}}" if module and len(names) > 1
        else ".".join(filter(None, (module, names[0]))) if module else ", ".join(names)
        for module, names in modules.items()
    ]  # fmt: skip


def _listed(title: str, keys: list[str]) -> list[str]:
    return [f"{title}: {len(keys)}", *(f"  {line}" for line in _grouped(keys))]


def describe(weights: Weights, match: Match | None = None, config_file: str = "") -> str:
    """
    The report of a conversion.

    Args:
        weights: the result of it.
        match: of a model, described too.
        config_file: the model's name in the report.
    """
    norm = f", norm {weights.norm}" if weights.norm else ""
    lines = [f"matched: {len(weights.state_dict)} tensors ({weights.author}{norm})"]
    lines += _listed("left over", weights.left_over)
    if match is not None:
        total = len(match.matched) + len(match.missing)
        lines += [f"model of {config_file}", f"  takes {len(match.matched)} of its {total} tensors"]
        lines += [f"  {line}" for line in _listed("misses", match.missing)]
        lines += [f"  {line}" for line in _listed("leaves over", match.left_over)]
    return "\n".join(lines)


def config_lines(weights: Weights, path: str) -> str:
    """The part of a Detectron2 config, in YAML, that goes with weights in the file `path`."""
    options: dict[str, Any] = {"MODEL": {"WEIGHTS": path}}
    merge(options, weights.config)
    return yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=200).rstrip()
