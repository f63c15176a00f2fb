"""
Convolutions with weight centralization, the half of MABN that lives outside of the norm.

With a kernel whose mean is zero, the convolution's output has (nearly) zero mean, so the norm behind
it needs no centering and two of BN's four batch statistics disappear.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
ICLR 2020, section 4.3, https://arxiv.org/abs/2001.06838
Authors' release: https://github.com/megvii-model/MABN (`CenConv2d`)
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import fx, nn

from ..ops import affine_map, constant
from .importing import take_over_state
from .mabn import MABN2d


class _CentralizeFunction(torch.autograd.Function):
    """W - mean(W) + m₀ for m₀ of shape (out_channels,), and its gradient, in few operations each."""

    @staticmethod
    def forward(ctx, weight, mean):
        in_order = weight  # of memory, so that the result keeps the format
        if weight.is_contiguous(memory_format=torch.channels_last):
            in_order = weight.permute(0, 2, 3, 1)
        filters = in_order.reshape(1, len(weight), -1, 1)
        now = filters.mean((0, 2, 3), dtype=mean.dtype)
        if not weight.is_cuda and weight.dtype == mean.dtype:
            return weight - (now - mean)[:, None, None, None]
        ones = constant(torch.ones, len(weight), dtype=mean.dtype, device=weight.device)
        centralized = affine_map(filters, now, ones, mean).view(in_order.shape)
        return centralized if in_order is weight else centralized.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, d):
        return d - d.mean((1, 2, 3), keepdim=True), None


def centralize_kernel(weight: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """
    W - mean(W) + m₀, the mean over in-channels, height and width for each output channel.

    Args:
        weight: kernel of shape (out_channels, in_channels / groups, kh, kw), any float dtype.
        mean: m₀, the mean that the result has, shape (out_channels, 1, 1, 1); None is 0.

    Returns:
        tensor of the weight's shape and dtype.
    """
    if torch.jit.is_scripting():
        centralized = _centralize(weight, mean)
    else:
        centralized = _centralize_in_few_operations(weight, mean)
    return centralized


def _centralize(weight: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    now = weight.mean(dim=(1, 2, 3), keepdim=True)
    return weight - (now if mean is None else now - mean.to(weight.dtype))


def _is_recorded(tensor: torch.Tensor) -> bool:
    is_proxy = isinstance(tensor, fx.Proxy)
    return is_proxy or torch.jit.is_tracing() or torch.compiler.is_compiling()


def _centralize_in_few_operations(weight: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    # What records has no use for an operation in Python, nor has an evaluation on the CPU.
    if _is_recorded(weight) or not (weight.is_cuda or torch.is_grad_enabled()):
        return _centralize(weight, mean)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if mean is None:
        mean = constant(torch.zeros, len(weight), dtype=dtype, device=weight.device)
    return _CentralizeFunction.apply(weight, mean.flatten().to(dtype))


def kernel_mean(convolution: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The mean of each filter of a kernel for a convolution, shape (out_channels, 1, 1, 1)."""
    if getattr(convolution, "transposed", False):  # (in, out / groups, kh, kw)
        mean = weight.unflatten(0, (convolution.groups, -1)).mean(dim=(1, 3, 4))
    else:
        mean = weight.mean(dim=(1, 2, 3))
    return mean.reshape(convolution.out_channels, 1, 1, 1)


def can_be_centralized(convolution: nn.Module) -> bool:
    """Whether a filter has more than one element; that of a depthwise 1x1 convolution would become 0."""
    return convolution.weight.numel() > convolution.out_channels


class CentralizedKernel:
    """
    Mixin for convolutions whose forward uses the centralized kernel while `centralized` is true.

    The parameter stays the raw kernel under the name `weight`, so checkpoints load by name either
    way, and it receives the gradient through the centralization.

    The forward of the class it is mixed into finds the centralized kernel as `self.weight`, on a copy of
    the module that shares everything else: `class CenDeformConv(CentralizedKernel, DeformConv): pass`

    Attributes:
        centralized: whether the kernel in use is centralized.

    Buffers:
        kernel_mean: m₀, shape (out_channels, 1, 1, 1): the mean that each centralized filter keeps. It is 0
            unless the weights were imported from a network whose kernels were not centralized.
    """

    kernel_mean: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._start_centralization()

    def _start_centralization(self) -> None:
        """Adds to a convolution what the mixin needs."""
        self.register_buffer("kernel_mean", self.weight.new_zeros(self.out_channels, 1, 1, 1))
        self.centralized = can_be_centralized(self)

    def centralized_weight(self) -> torch.Tensor:
        """The kernel in use, of the shape of `weight`."""
        return centralize_kernel(self.weight, self.kernel_mean) if self.centralized else self.weight

    def forward(self, *args, **kwargs):
        if not self.centralized:
            return super().forward(*args, **kwargs)
        # A module that is running may be called by another thread: this one is not changed.
        view = copy.copy(self)
        view._parameters = {**self._parameters, "weight": self.centralized_weight()}
        view.centralized = False
        return view.forward(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """
        A file without m₀ is one of centralized kernels, or of BN, whose function a MABN of this convolution
        then takes over.
        """
        weight, norm = state_dict.get(prefix + "weight"), getattr(self, "norm", None)
        if weight is not None and prefix + "kernel_mean" not in state_dict:
            mean = torch.zeros_like(self.kernel_mean)
            is_bn = isinstance(norm, MABN2d) and take_over_state(norm, state_dict, f"{prefix}norm.")
            if is_bn and self.centralized and weight.shape == self.weight.shape:
                mean = kernel_mean(self, weight)
            state_dict[prefix + "kernel_mean"] = mean
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CenConv2d(CentralizedKernel, nn.Conv2d):
    """
    Convolution whose forward uses the centralized kernel.

    A drop-in for `detectron2.layers.Conv2d`: takes the same `norm` and `activation`. With a norm that does
    not need it, it is an ordinary convolution. Without a norm of its own the kernel is centralized: the
    MABN then stands beside the convolution, as in `nn.Sequential(CenConv2d(...), MABN2d(...))`.
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
        wants_it = norm is None or getattr(norm, "needs_centralized_kernel", False)
        self.centralized = wants_it and can_be_centralized(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            x = self._conv_forward(x, self.centralized_weight(), self.bias)
        else:
            x = self._centralized_conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _centralized_conv(self, x: torch.Tensor) -> torch.Tensor:
        if self.centralized and self._has_more_weights_than_values(x):
            return self._centralize_output(x)
        return self._conv_forward(x, self.centralized_weight(), self.bias)

    def _has_more_weights_than_values(self, x: torch.Tensor) -> bool:
        """Whether an evaluation on the CPU reads and writes less where the output is centralized."""
        if self.training or torch.is_grad_enabled() or _is_recorded(x) or x.dim() != 4:
            return False
        if self.groups > 1 or self.padding_mode != "zeros" or x.device.type != "cpu":
            return False
        if torch.is_autocast_cpu_enabled() or x.dtype not in (torch.float32, torch.float64):
            return False
        n, _, height, width = x.shape
        outputs = n * self.out_channels * height * width // math.prod(self.stride)
        return self.weight.numel() > x.numel() + 2 * outputs

    def _centralize_output(self, x: torch.Tensor) -> torch.Tensor:
        """(W - mean(W) + m₀) * x as W * x - (mean(W) - m₀)·(1 * x), where * is the convolution."""
        ones = x.new_ones(1, 1, *self.kernel_size)
        total = self._conv_forward(x.sum(1, keepdim=True), ones, None)
        excess = self.weight.mean((1, 2, 3)) - self.kernel_mean.flatten()
        out = self._conv_forward(x, self.weight, self.bias)
        return out.addcmul_(excess[:, None, None], total, value=-1)


class CenConvTranspose2d(CentralizedKernel, nn.ConvTranspose2d):
    """
    Transposed convolution with a centralized kernel.

    Its `weight` has the shape (in_channels, out_channels / groups, kh, kw); the mean is over the
    in-channels of the group, height and width for each output channel, as in a convolution.
    """

    def centralized_weight(self) -> torch.Tensor:
        if not self.centralized:
            return self.weight
        grouped = self.weight.unflatten(0, (self.groups, -1))  # (groups, in, out, kh, kw)
        now = grouped.mean(dim=(1, 3, 4), keepdim=True)
        mean = self.kernel_mean.to(now.dtype).view(self.groups, 1, -1, 1, 1)
        return (grouped - (now - mean)).flatten(0, 1)
