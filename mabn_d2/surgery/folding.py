"""Norms that evaluate to one affine map per channel disappear into the convolution in front of them."""

import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..layers import CentralizedKernel
from .centralization import CENTRALIZED_CLASSES
from .sites import NormSite, are_levels, find_norm_sites, is_norm

logger = logging.getLogger(__name__)


class ChannelAffine(nn.Module):
    """scale·x + shift per channel; without a scale, x + shift."""

    def __init__(self, scale: torch.Tensor | None, shift: torch.Tensor):
        """
        Args:
            scale, shift: shape (C,).
        """
        super().__init__()
        self.register_buffer("scale", None if scale is None else scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            x = x * self.scale
        return x + self.shift


class InTurn(nn.ModuleList):
    """One module per feature level: each call is the next one's, as in Detectron2's `CycleBatchNormList`."""

    def __init__(self, modules):
        super().__init__(modules)
        self._next = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now, out = self._next, x
        self._next = 0  # after the last one
        for i, module in enumerate(self):  # TorchScript knows no other way to one of them
            if i == now:
                out = module(x)
            elif i == now + 1:
                self._next = i
        return out


class AffineMap(NamedTuple):
    """What a norm evaluates to: then(scale·x + shift), in float64, shape (C,)."""

    scale: torch.Tensor
    shift: torch.Tensor
    then: nn.Module | None = None  # the activation that timm's norms apply


def evaluation_map(norm: nn.Module, dims: int) -> AffineMap | str:
    """
    The affine map that a norm is in evaluation, whatever its class, or why it is none.

    It follows from the attributes that BN has, and is compared with what the norm does to a probe.

    Args:
        norm: BN, or what looks like it.
        dims: of the norm's input.
    """
    if not _has_statistics(norm):
        return "it has no running statistics: its map depends on the input"
    mean, var = norm.running_mean, norm.running_var
    scale = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    scale, shift = scale.detach(), shift.detach()
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its map is not finite"
    parts = [getattr(norm, name, None) for name in ("drop", "act")]
    parts = [
        part for part in parts if isinstance(part, nn.Module) and type(part) is not nn.Identity
    ]
    then = nn.Sequential(*parts) if len(parts) > 1 else parts[0] if parts else None

    spread = (-1, *[1] * (dims - 2))
    probe = torch.linspace(-3, 3, 4 * len(scale), dtype=torch.float64)
    probe = probe.view(4, -1, *spread[1:])
    expected = scale.cpu().view(spread) * probe + shift.cpu().view(spread)
    with torch.no_grad():
        if then is not None:
            expected = copy.deepcopy(then).cpu().double().eval()(expected)
        try:
            got = copy.deepcopy(norm).cpu().double().eval().forward(probe)  # without hooks
        except (RuntimeError, ValueError, TypeError) as error:
            return f"{type(norm).__name__} does not take a tensor alone: {error}"
    if not torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())):
        return f"{type(norm).__name__} does not evaluate to BN's affine map"
    return AffineMap(scale, shift, then)


def _has_statistics(norm: nn.Module) -> bool:
    return all(
        torch.is_tensor(getattr(norm, name, None)) for name in ("running_mean", "running_var")
    )


def _maps_of_levels(norms: nn.ModuleList) -> list[AffineMap] | str:
    """One map per feature level, of Detectron2's norms per level with shared affine parameters."""
    maps = []
    for norm in norms:
        level = evaluation_map(norm, dims=4)
        if isinstance(level, str):
            return level
        scale, shift, _ = level
        if getattr(norms, "_affine", False):
            scale = scale * norms.weight.detach().double()
            shift = shift * norms.weight.detach().double() + norms.bias.detach().double()
        maps.append(AffineMap(scale, shift))
    return maps


@torch.no_grad()
def scale_output(
    convolution: nn.Module, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> None:
    """
    Makes a convolution or linear layer compute scale·convolution(x) + shift, in place.

    Args:
        convolution: its kernel is not centralized, see :func:`decentralize`.
        scale, shift: shape (C,), float64. None is 0, for convolutions that have no bias.
    """
    weight, bias = convolution.weight, convolution.bias
    if getattr(convolution, "transposed", False):  # (in, out / groups, ...)
        grouped = weight.double().unflatten(0, (convolution.groups, -1))
        per_filter = scale.view(convolution.groups, 1, -1, *[1] * (grouped.dim() - 3))
        scaled = (grouped * per_filter).flatten(0, 1)
    else:
        scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    convolution.weight = nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)
    if bias is not None or shift is not None:
        new = 0 if bias is None else bias.double() * scale
        new = new if shift is None else new + shift
        convolution.bias = nn.Parameter(new.to(weight.dtype), weight.requires_grad)


@torch.no_grad()
def decentralize(convolution: nn.Module) -> None:
    """Makes the kernel in use the parameter of an ordinary convolution, in place."""
    if not isinstance(convolution, CentralizedKernel):
        return
    convolution.weight.copy_(convolution.centralized_weight())
    convolution.centralized = False
    has_more = any(getattr(convolution, name, None) for name in ("norm", "activation"))
    if isinstance(convolution, nn.Conv2d) and not has_more:
        plain = nn.Conv2d
    else:
        plain = {cen: plain for plain, cen in CENTRALIZED_CLASSES.items()}.get(type(convolution))
    if plain is not None and not (plain is nn.Conv2d and has_more):
        del convolution.kernel_mean
        convolution.__class__ = plain


def fold(model: nn.Module, example_input: Any = None, per_level: bool = False) -> nn.Module:
    """
    A copy of a model for inference, in which norms have become part of the convolutions in front of them.

    Every norm that evaluates to an affine map per channel: MABN, BRN, MBN, BN, SyncBN, FrozenBN and what
    looks like them. Plain, grouped, depthwise, transposed and deformable convolutions, and linear layers.
    Centralized kernels become ordinary ones. The outputs are the model's in evaluation, to rounding.

    A norm stays where it cannot be told for certain that all its input comes from convolutions whose output
    goes nowhere else. All that stay are logged by name with the reason; see :func:`foldable_sites`.

    Args:
        model: it is not changed. Of a `DistributedDataParallel` it is the module inside.
        example_input: the argument of the model, a tuple being several: for models whose structure leaves
            open which convolution feeds which norm.
        per_level: a convolution that has one norm per feature level (Detectron2's RetinaNet and FCOS) gets
            one kernel per level. Otherwise the kernel is shared and the norm of a level becomes one
            multiplication and addition.

    Returns:
        the folded model, in evaluation mode.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    folded = copy.deepcopy(model).eval()
    plan = _plan(folded, example_input, per_level)
    for step in plan:
        if step.sites[0].reason:
            _simplify(folded, step)
        else:
            _fold(folded, step)
    for module in list(folded.modules()):
        decentralize(module)
    _log([step.sites[0] for step in plan])
    return folded


def foldable_sites(
    model: nn.Module, example_input: Any = None, per_level: bool = False
) -> list[NormSite]:
    """
    What :func:`fold` does with each norm of a model, with the same arguments.

    Returns:
        the sites of every norm, with an empty `reason` where it is folded into the convolution.
    """
    return [site for step in _plan(model, example_input, per_level) for site in step.sites]


class _Step(NamedTuple):
    """A norm with all its sites, of which all or none has a reason, and its maps, one per level."""

    sites: list[NormSite]
    maps: list[AffineMap]


def _plan(model: nn.Module, example_input: Any, per_level: bool) -> list[_Step]:
    sites_of: dict[str, list[NormSite]] = {}
    norms_of: dict[str, list[str]] = {}
    for site in find_norm_sites(model, is_norm, example_input):
        sites_of.setdefault(site.norm_name, []).append(site)
        norms_of.setdefault(site.convolution_name, []).append(site.norm_name)

    def reason_to_leave(site: NormSite) -> str:
        convolution = site.convolution
        others = [name for name in norms_of[site.convolution_name] if name != site.norm_name]
        if site.reason or convolution is None:
            return site.reason
        if site.evidence == "order":
            return (
                f"only the order of assignment says that {site.convolution_name} feeds it; an example "
                "input tells"
            )
        for name in ("weight", "bias"):
            if getattr(convolution, name) is not None and name not in convolution._parameters:
                return f"the {name} of {site.convolution_name} is no parameter but computed"
        return f"{site.convolution_name} feeds {', '.join(others)}, too" if others else ""

    steps = []
    for sites in sites_of.values():
        norm, convolution = sites[0].norm, sites[0].convolution
        if are_levels(norm):
            maps = _maps_of_levels(norm)
        elif convolution is None and _has_statistics(norm):
            maps = sites[0].reason
        else:
            maps = evaluation_map(norm, 4 if convolution is None else convolution.weight.dim())
        reasons = [maps] if isinstance(maps, str) else []
        reasons += filter(None, map(reason_to_leave, sites))
        if are_levels(norm) and not per_level and not reasons:
            levels = f"{len(norm)} feature levels, each with its norm"
            reasons = [f"{sites[0].convolution_name} is shared by {levels}"]
        if isinstance(maps, str):
            maps = []
        elif isinstance(maps, AffineMap):
            maps = [maps]
        reason = reasons[0] if reasons else ""
        steps.append(_Step([site._replace(reason=reason) for site in sites], maps))
    return steps


def _fold(model: nn.Module, step: _Step) -> None:
    norm = step.sites[0].norm
    takes_bias = all("bias" in site.convolution._parameters for site in step.sites)
    after = None
    for site in step.sites:
        convolution, is_inside = site.convolution, site.evidence == "inside"
        if is_inside:
            convolution.norm = None
        decentralize(convolution)
        if are_levels(norm):
            levels = []
            for level_map in step.maps:
                level = copy.deepcopy(convolution)
                left = _absorb(level, level_map, takes_bias)
                levels.append(level if left is None else nn.Sequential(level, left))
            replace_module(model, convolution, InTurn(levels))
        else:
            after = _absorb(convolution, step.maps[0], takes_bias)
            if is_inside:
                convolution.norm = after
    replace_module(model, norm, after or nn.Identity())


def _absorb(convolution: nn.Module, norm: AffineMap, takes_bias: bool) -> nn.Module | None:
    """Folds a map into a convolution, and returns what is left to be done after it."""
    scale_output(convolution, norm.scale, norm.shift if takes_bias else None)
    if takes_bias:
        return norm.then
    shift = ChannelAffine(None, norm.shift.to(convolution.weight.dtype))
    return shift if norm.then is None else nn.Sequential(shift, norm.then)


def _simplify(model: nn.Module, step: _Step) -> None:
    """Makes the norms of feature levels that stay one multiplication and addition each."""
    site = step.sites[0]
    if are_levels(site.norm) and step.maps and site.convolution is not None:
        dtype = site.convolution.weight.dtype
        levels = (ChannelAffine(map.scale.to(dtype), map.shift.to(dtype)) for map in step.maps)
        replace_module(model, site.norm, InTurn(levels))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another wherever a model holds it."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _log(sites: list[NormSite]) -> None:
    left = [site for site in sites if site.reason]
    logger.info("fold: %d of %d norms are in their convolution", len(sites) - len(left), len(sites))
    for site in left:
        logger.info(
            "fold: %s (%s) stays: %s", site.norm_name, type(site.norm).__name__, site.reason
        )
