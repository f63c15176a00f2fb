"""BN's function in a norm of this package."""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from .mabn import MABN2d
from .steady_state import start_in_steady_state

EPS = 1e-5  # of BN in Detectron2 and torchvision, whose files do not hold it


@torch.no_grad()
def take_over_batch_norm(
    norm: nn.Module,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> None:
    """
    Makes a norm compute γ·(x - μ) / sqrt(σ² + ε) + β in evaluation, in place.

    See :func:`mabn_d2.surgery.import_batch_norm`, whose arguments and errors these are.
    """
    var = var.double() + eps
    weight = torch.ones_like(var) if weight is None else weight.double()
    bias = torch.zeros_like(var) if bias is None else bias.double()
    is_dead = weight == 0
    if ((var <= 0) & ~is_dead).any():
        raise ValueError(
            "The norm to import divides by 0: running_var + eps of a channel is not positive"
        )
    own_var = (var - norm.eps).clamp(min=torch.finfo(norm.running_var.dtype).tiny)
    factor = ((own_var + norm.eps) / var).sqrt()
    weight = torch.where(
        is_dead, 0.0, torch.where(var - norm.eps == own_var, weight, weight * factor)
    )
    if norm.weight is not None:
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    elif not (weight == 1).all() or bias.any():
        raise ValueError(f"{type(norm).__name__} without affine parameters cannot take up γ and β")
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(own_var)
    start_in_steady_state(norm)


def is_affine(mean: torch.Tensor, var: torch.Tensor) -> bool:
    """Whether statistics are those of an affine map, as Detectron2 makes it a FrozenBN: mean 0, variance 1."""
    return not mean.any() and bool((var == 1 - EPS).all() or (var == 1).all())


def is_of_mabn(state_dict: Mapping[str, torch.Tensor], prefix: str) -> bool:
    """Whether the entries are those of a MABN, of this package or of the authors' release."""
    return prefix + "psi.count" in state_dict or prefix + "iters" in state_dict


def take_over_state(norm: MABN2d, state_dict: dict[str, torch.Tensor], prefix: str) -> bool:
    """
    Makes the entries of a BN with statistics those of a MABN with its function, in place.

    Warns where there is no MABN and no BN with statistics.

    Args:
        norm: what the state dict is for; it is not changed.
        prefix: of the norm's entries.

    Returns:
        whether it was a BN with statistics.
    """
    weight, bias, mean, var = (
        state_dict.get(prefix + name) for name in ("weight", "bias", "running_mean", "running_var")
    )
    if is_of_mabn(state_dict, prefix) or (mean is None and var is not None):  # or an early release
        return False
    if mean is None or var is None or is_affine(mean, var):
        warnings.warn(
            "Weights of an affine map, of GN or of no norm are loaded into MABN as they are, and are another "
            "function there. The trainers of mabn_d2 measure the statistics that are missing and keep the "
            "function of maps, and so does mabn_d2.from_bn", stacklevel=2,
        )  # fmt: skip
        return False
    if var.shape != norm.running_var.shape:
        return False
    new = copy.deepcopy(norm)
    take_over_batch_norm(new, weight, bias, mean, var, EPS)
    state_dict.pop(prefix + "num_batches_tracked", None)
    state_dict.update({prefix + key: value for key, value in new.state_dict().items()})
    return True
