"""Centralized kernels for the convolutions that feed a MABN."""

import logging

from torch import nn

from ..layers import CenConv2d, CenConvTranspose2d
from ..layers.centralized_conv import can_be_centralized
from .sites import NormSite, find_norm_sites

logger = logging.getLogger(__name__)

# Class of a convolution -> its centralized counterpart, which differs in forward only.
CENTRALIZED_CLASSES: dict[type, type] = {
    nn.Conv2d: CenConv2d,
    nn.ConvTranspose2d: CenConvTranspose2d,
}


def centralize_convolution(convolution: nn.Module) -> None:
    """
    Makes a convolution use its centralized kernel, in place.

    Raises:
        KeyError: the class has no centralized counterpart.
    """
    convolution.__class__ = CENTRALIZED_CLASSES[type(convolution)]
    convolution._start_centralization()
    for name in ("norm", "activation"):
        if not hasattr(convolution, name):
            setattr(convolution, name, None)


def centralize(model: nn.Module) -> list[NormSite]:
    """
    Centralizes every convolution of a model that feeds a MABN, in place; idempotent.

    Logs how many norms and centralized convolutions there are, and warns of each norm without one.

    Returns:
        every norm of the model with its convolution.
    """
    sites = find_norm_sites(model)
    for site in sites:
        if type(site.convolution) in CENTRALIZED_CLASSES and can_be_centralized(site.convolution):
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
