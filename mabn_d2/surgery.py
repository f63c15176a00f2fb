"""Which convolution feeds which norm, and which images a norm sees. For any PyTorch model."""
import logging
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from torch import nn

from .layers import (
    CenConv2d,
    CenConvTranspose2d,
    CentralizedKernel,
    GhostBatchNorm2d,
    MABN2d,
    Norm2d,
)

logger = logging.getLogger(__name__)

# Class of a convolution -> its centralized counterpart, which differs in forward only.
CENTRALIZED_CLASSES: Dict[type, type] = {
    nn.Conv2d: CenConv2d,
    nn.ConvTranspose2d: CenConvTranspose2d,
}

# Modules between a convolution and its norm that leave the mean at zero.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)


class NormSite(NamedTuple):
    """A norm with the convolution that feeds it, None where there is none to be found."""

    norm_name: str
    norm: nn.Module
    convolution_name: Optional[str]
    convolution: Optional[nn.Module]

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


def find_norm_sites(model: nn.Module) -> List[NormSite]:
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
) -> Iterator[Tuple[str, nn.Module, Optional[str], Optional[nn.Module]]]:
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


def centralize_convolution(convolution: nn.Module) -> None:
    """
    Makes a convolution use its centralized kernel, in place.

    Raises:
        KeyError: the class has no centralized counterpart.
    """
    convolution.__class__ = CENTRALIZED_CLASSES[type(convolution)]
    for name in ("norm", "activation"):
        if not hasattr(convolution, name):
            setattr(convolution, name, None)


def centralize(model: nn.Module) -> List[NormSite]:
    """
    Centralizes every convolution of a model that feeds a MABN, in place; idempotent.

    Logs how many norms and centralized convolutions there are, and warns of each norm without one.

    Returns:
        every norm of the model with its convolution.
    """
    sites = find_norm_sites(model)
    for site in sites:
        if type(site.convolution) in CENTRALIZED_CLASSES:
            centralize_convolution(site.convolution)
    if sites:
        count = sum(site.centralized for site in sites)
        logger.info("MABN: %d norms, %d centralized convolutions", len(sites), count)
    for site in sites:
        if not site.centralized:
            fed_by = "no convolution that could be found"
            if site.convolution is not None:
                fed_by = f"{site.convolution_name} ({type(site.convolution).__name__})"
            logger.warning(
                "MABN: %s is fed by %s, which is not centralized. MABN does not center its input: "
                "expect a loss of accuracy.", site.norm_name, fed_by,
            )  # fmt: skip
    return sites


def set_norm_batch_size(model: nn.Module, size: int) -> None:
    """
    Makes every norm of a model that has batch statistics take them from groups of images, in place.

    The norm sees its input as groups of `size` consecutive images, one after the other: the output,
    the gradients and the statistics are those of calling it on each group in turn, but computed in
    one pass. `nn.BatchNorm2d` becomes a `GhostBatchNorm2d`, with the same state dict. Norms without
    batch statistics are left alone.

    Args:
        size: images in a normalization batch; 0 stands for all images of the input.

    Raises:
        ValueError: the size is negative, or a norm's statistics span several workers.
    """
    if size < 0:
        raise ValueError(f"The normalization batch size must be a non-negative integer, got {size}")
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            if not module.track_running_stats or module.momentum is None:
                raise ValueError(f"{name}: needs running statistics with a momentum, is {module}")
            module.__class__ = GhostBatchNorm2d
        if isinstance(module, Norm2d):
            module.norm_batch_size = size
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which does not take its statistics from a "
                "group of one worker's images"
            )
