"""BN's function in a norm of this package, exactly."""

import torch
from torch import nn

from ..layers import CentralizedKernel
from ..training.steady_state import start_in_steady_state


def kernel_mean(convolution: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The mean of each filter of a kernel for a convolution, shape (out_channels, 1, 1, 1)."""
    if getattr(convolution, "transposed", False):  # (in, out / groups, kh, kw)
        mean = weight.unflatten(0, (convolution.groups, -1)).mean(dim=(1, 3, 4))
    else:
        mean = weight.mean(dim=(1, 2, 3))
    return mean.reshape(convolution.out_channels, 1, 1, 1)


@torch.no_grad()
def keep_kernel_mean(convolution: nn.Module) -> None:
    """Makes the kernel in use the loaded one, in place: the mean that each filter has becomes m₀."""
    if isinstance(convolution, CentralizedKernel) and convolution.centralized:
        convolution.kernel_mean.copy_(kernel_mean(convolution, convolution.weight))


@torch.no_grad()
def import_batch_norm(
    norm: nn.Module,
    convolution: nn.Module | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> None:
    """
    Makes a norm with the convolution in front of it the function that BN is in evaluation, in place.

    That is out = γ·(x - μ) / sqrt(σ² + ε) + β of the convolution's output x with the kernel as it is loaded.
    It holds in evaluation for every norm that evaluates to BN's formula. It holds from the first training
    step for a MABN, whose moving averages start in their steady state, so that r cancels χ̄², and for a BRN
    where r and d are not clipped.

    Args:
        norm: MABN2d, BRN2d, MBN2d, or a norm with BN's parameters and buffers.
        convolution: what feeds the norm; None if there is none.
        weight: γ, shape (C,); None is 1.
        bias: β, shape (C,); None is 0.
        mean: μ, shape (C,).
        var: σ², shape (C,).
        eps: ε that the source adds to σ²; the norm's own may differ.

    Raises:
        ValueError: the function has a division by 0, or the norm has no γ and β and needs them.
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
    if convolution is not None:
        keep_kernel_mean(convolution)
