"""BN's function in a norm of this package with the convolution in front of it, exactly."""

import torch
from torch import nn

from ..layers import CentralizedKernel
from ..layers.centralized_conv import kernel_mean
from ..layers.importing import take_over_batch_norm


@torch.no_grad()
def keep_kernel_mean(convolution: nn.Module) -> None:
    """Makes the kernel in use the loaded one, in place: the mean that each filter has becomes m₀."""
    if isinstance(convolution, CentralizedKernel) and convolution.centralized:
        convolution.kernel_mean.copy_(kernel_mean(convolution, convolution.weight))


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
    take_over_batch_norm(norm, weight, bias, mean, var, eps)
    if convolution is not None:
        keep_kernel_mean(convolution)
