"""
Folds the statistics of BN into its weights, γ / √(σ² + ε) and β - μ · γ / √(σ² + ε), as the ImageNet files of MSRA hold them.

    python -m mabn_d2.study.affine_weights SRC.pth DST.pth
"""

import sys

import torch

from ..checkpoint.reading import read_checkpoint
from ..utils.files import atomic_write

EPS = 1e-5


def as_affine_maps(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        weights: a state dict of a model with BN.

    Returns:
        one without BN's statistics, with the function that it had in evaluation.
    """
    folded = dict(weights)
    for name in [
        key.removesuffix(".running_var") for key in weights if key.endswith(".running_var")
    ]:
        mean, var = folded.pop(f"{name}.running_mean"), folded.pop(f"{name}.running_var")
        folded.pop(f"{name}.num_batches_tracked", None)
        folded[f"{name}.weight"] = weights[f"{name}.weight"] / (var + EPS).sqrt()
        folded[f"{name}.bias"] = weights[f"{name}.bias"] - mean * folded[f"{name}.weight"]
    return folded


def main(source: str, destination: str) -> None:
    with atomic_write(destination) as f:
        torch.save({"model": as_affine_maps(read_checkpoint(source)["model"])}, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
