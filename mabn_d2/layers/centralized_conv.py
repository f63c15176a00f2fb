"""
Convolution with weight centralization, the half of MABN that lives outside of the norm.

With a kernel whose mean is zero, the convolution's output has (nearly) zero mean, so the norm behind
it needs no centering and two of BN's four batch statistics disappear.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, section 4.3, https://arxiv.org/abs/2001.06838
Authors' release: https://github.com/megvii-model/MABN (`CenConv2d`)
"""

from collections.abc import Callable

import torch
from torch import nn

from .mabn import MABN2d


def centralize_kernel(weight: torch.Tensor) -> torch.Tensor:
    """
    W - mean(W), the mean over in-channels, height and width for each output channel.

    Args:
        weight: kernel of shape (out_channels, in_channels / groups, kh, kw), any float dtype.

    Returns:
        tensor of the same shape and dtype.
    """
    return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


class CenConv2d(nn.Conv2d):
    """
    Convolution whose forward uses the centralized kernel when a :class:`MABN2d` follows it.

    A drop-in for `detectron2.layers.Conv2d`: takes the same `norm` and `activation`. The parameter
    stays the raw kernel under the name `weight`, so checkpoints load by name either way, and it
    receives the gradient through the centralization.

    Without a norm of its own the kernel is centralized: the MABN then stands beside the
    convolution, as in `nn.Sequential(CenConv2d(...), MABN2d(...))`. With a norm of another kind
    it is an ordinary convolution.
    """

    def __init__(
        self,
        *args,
        norm: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ):
        """
        Args:
            norm: applied to the convolution's output.
            activation: applied after the norm.
            args, kwargs: those of `nn.Conv2d`.
        """
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centralized = self.norm is None or isinstance(self.norm, MABN2d)
        weight = centralize_kernel(self.weight) if centralized else self.weight
        x = self._conv_forward(x, weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class CentralizedKernel:
    """
    Mixin for convolutions with a forward of their own (deformable ones, for example).

    The forward of the class it is mixed into finds the centralized kernel as `self.weight` for the
    length of the call. `class CenDeformConv(CentralizedKernel, DeformConv): pass`
    """

    centralize_kernel = staticmethod(centralize_kernel)

    def forward(self, *args, **kwargs):
        raw = self.weight
        self._parameters["weight"] = self.centralize_kernel(raw)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters["weight"] = raw


class CenConvTranspose2d(CentralizedKernel, nn.ConvTranspose2d):
    """
    Transposed convolution with a centralized kernel.

    Its `weight` has the shape (in_channels, out_channels / groups, kh, kw); the mean is over the
    in-channels of the group, height and width for each output channel, as in a convolution.
    """

    def centralize_kernel(self, weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.unflatten(0, (self.groups, -1))
        return (grouped - grouped.mean(dim=(1, 3, 4), keepdim=True)).flatten(0, 1)
