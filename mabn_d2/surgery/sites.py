"""Which convolution feeds which norm. For any PyTorch model."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from ..layers import CentralizedKernel

# Modules between a convolution and its norm that leave the mean at zero.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)


class NormSite(NamedTuple):
    """A norm with the convolution that feeds it, None where there is none to be found."""

    norm_name: str
    norm: nn.Module
    convolution_name: str | None
    convolution: nn.Module | None

    @property
    def centralized(self) -> bool:
        """Whether the norm gets what it needs."""
        return isinstance(self.convolution, CentralizedKernel) and self.convolution.centralized


def needs_centralized_kernel(module: nn.Module) -> bool:
    """Whether the module is a norm like MABN, which does not center its input."""
    return getattr(module, "needs_centralized_kernel", False)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module's parameter `weight` is a convolution kernel."""
    return len(getattr(getattr(module, "weight", None), "shape", ())) == 4


def find_norm_sites(
    model: nn.Module, is_norm: Callable[[nn.Module], bool] = needs_centralized_kernel
) -> list[NormSite]:
    """
    Every norm of a model with the convolution in front of it.

    A norm stands inside of its convolution (Detectron2's `Conv2d(norm=...)`), or it is a later
    sibling: directly behind it in an `nn.Sequential`, and in any other module the first norm that
    was assigned after it. The number of channels must agree.

    Args:
        model: any module.
        is_norm: which modules are meant. A `ModuleList` of them, one per feature level, is one norm.
    """
    sites = []
    for parent_name, parent in model.named_modules(remove_duplicate=True):
        prefix = f"{parent_name}." if parent_name else ""
        if _is_norm_or_levels(parent, is_norm):
            continue
        for name, norm, convolution_name, convolution in _norms_among_children(parent, is_norm):
            if convolution is parent:
                convolution_name = parent_name
            elif convolution is not None:
                convolution_name = prefix + convolution_name
            sites.append(NormSite(prefix + name, norm, convolution_name, convolution))
    return sites


def _is_norm_or_levels(module: nn.Module, is_norm: Callable[[nn.Module], bool]) -> bool:
    if isinstance(module, nn.ModuleList):
        return len(module) > 0 and all(map(is_norm, module))
    return is_norm(module)


def _norms_among_children(
    parent: nn.Module, is_norm: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, str | None, nn.Module | None]]:
    candidate_name, candidate = None, parent if is_convolution(parent) else None
    for name, child in parent.named_children():
        if _is_norm_or_levels(child, is_norm):
            channels = (child[0] if isinstance(child, nn.ModuleList) else child).num_features
            fits = getattr(candidate, "out_channels", None) == channels
            yield name, child, *((candidate_name, candidate) if fits else (None, None))
            candidate_name, candidate = None, None
        elif is_convolution(child):
            candidate_name, candidate = name, child
        elif isinstance(parent, nn.Sequential) and not isinstance(child, _TRANSPARENT):
            candidate_name, candidate = None, None
