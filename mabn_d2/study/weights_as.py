"""
Writes weights of BN in another form, whose function in evaluation is the same.

    python -m mabn_d2.study.weights_as FORM SRC.pth DST.pth
"""

import sys

import torch

from ..checkpoint.reading import read_checkpoint
from ..utils.files import atomic_write

EPS = 1e-5

StateDict = dict[str, torch.Tensor]


def _norms(weights: StateDict) -> list[str]:
    ending = ".running_var"
    return [key.removesuffix(ending) for key in weights if key.endswith(ending)]


def affine(weights: StateDict) -> StateDict:
    """
    γ / √(σ² + ε) and β - μ·γ / √(σ² + ε), a mean of 0 and a variance of 1 - ε: how Detectron2 holds the ImageNet files
    of MSRA, in which the statistics are folded away.
    """
    folded = dict(weights)
    for name in _norms(weights):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale = weights[f"{name}.weight"] / (var + EPS).sqrt()
        folded[f"{name}.weight"] = scale
        folded[f"{name}.bias"] = weights[f"{name}.bias"] - mean * scale
        folded[f"{name}.running_mean"] = torch.zeros_like(mean)
        folded[f"{name}.running_var"] = torch.ones_like(var) - EPS
        folded.pop(f"{name}.num_batches_tracked", None)  # FrozenBN has none
    return folded


def mean_absorbed(weights: StateDict) -> StateDict:
    """
    A mean of 0 and χ² = σ² + μ² for the variance: a norm that does not subtract a mean has the function with
    γ·√(χ² + ε) / √(σ² + ε) and the β of :func:`affine`.
    """
    absorbed = affine(weights)
    for name in _norms(weights):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        second_moment = var + mean.square()
        absorbed[f"{name}.weight"] = absorbed[f"{name}.weight"] * (second_moment + EPS).sqrt()
        absorbed[f"{name}.running_var"] = second_moment
    return absorbed


FORMS = {form.__name__: form for form in (affine, mean_absorbed)}


def main(form: str, source: str, destination: str) -> None:
    checkpoint = read_checkpoint(source)
    kept = {key: checkpoint[key] for key in checkpoint.keys() & {"matching_heuristics"}}
    with atomic_write(destination) as f:
        torch.save({"model": FORMS[form](checkpoint["model"]), **kept}, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
