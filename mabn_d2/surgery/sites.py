"""Which convolution feeds which norm. For any PyTorch model."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..layers import CenConv2d, CentralizedKernel, MABN2d

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
        return isinstance(self.convolution, (CenConv2d, CentralizedKernel))


def is_mabn(module: nn.Module) -> bool:
    """Whether the module is a MABN2d, or a list of them that takes turns (one per level)."""
    if isinstance(module, nn.ModuleList):
        return len(module) > 0 and all(isinstance(child, MABN2d) for child in module)
    return isinstance(module, MABN2d)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module's parameter `weight` is a convolution kernel."""
    return len(getattr(getattr(module, "weight", None), "shape", ())) == 4


def find_norm_sites(model: nn.Module) -> list[NormSite]:
    """
    Every MABN of a model with the convolution in front of it.

    A norm stands inside of its convolution (Detectron2's `Conv2d(norm=...)`), or it is a later
    sibling: directly behind it in an `nn.Sequential`, and in any other module the first norm that
    was assigned after it. The number of channels must agree.
    """
    sites = []
    for parent_name, parent in model.named_modules(remove_duplicate=True):
        prefix = f"{parent_name}." if parent_name else ""
        if is_mabn(parent):
            continue
        for name, norm, convolution_name, convolution in _norms_among_children(parent):
            if convolution is parent:
                convolution_name = parent_name
            elif convolution is not None:
                convolution_name = prefix + convolution_name
            sites.append(NormSite(prefix + name, norm, convolution_name, convolution))
    return sites


def _norms_among_children(
    parent: nn.Module,
) -> Iterator[tuple[str, nn.Module, str | None, nn.Module | None]]:
    candidate_name, candidate = None, parent if is_convolution(parent) else None
    for name, child in parent.named_children():
        if is_mabn(child):
            channels = (child[0] if isinstance(child, nn.ModuleList) else child).num_features
            fits = getattr(candidate, "out_channels", None) == channels
            yield name, child, *((candidate_name, candidate) if fits else (None, None))
            candidate_name, candidate = None, None
        elif is_convolution(child):
            candidate_name, candidate = name, child
        elif isinstance(parent, nn.Sequential) and not isinstance(child, _TRANSPARENT):
            candidate_name, candidate = None, None
