"""Norms of one kind become norms of another, in any PyTorch model."""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..layers import BRN2d, CentralizedKernel, MABN2d, MBN2d
from ..layers.centralized_conv import can_be_centralized
from .centralization import CENTRALIZED_CLASSES, centralize_convolution
from .folding import decentralize, evaluation_map, replace_module
from .importing import import_batch_norm, keep_kernel_mean
from .sites import NormSite, are_levels, find_norm_sites, is_norm, num_channels

logger = logging.getLogger(__name__)

# Name of a norm -> its class.
NORMS: dict[str, Callable[..., nn.Module]] = {
    "MABN": MABN2d,
    "BRN": BRN2d,
    "MBN": MBN2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
}
# What evaluates to an affine map, so that its function can be preserved.
PRESERVED = ("BN", "SyncBN", "FrozenBN", "MABN", "BRN", "MBN")


def kind_of(norm: nn.Module) -> str:
    """The name of a norm's kind: one of `PRESERVED`, "GN", "LN" or "IN"."""
    for name in ("MABN", "BRN", "MBN", "SyncBN"):
        if isinstance(norm, NORMS[name]):
            return name
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "BN"
    if isinstance(norm, nn.GroupNorm):
        return "GN"
    if hasattr(norm, "normalized_shape"):
        return "LN"
    return "FrozenBN" if hasattr(norm, "running_var") and not _is_instance_norm(norm) else "IN"


def _is_instance_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.modules.instancenorm._InstanceNorm)


def convert(
    model: nn.Module,
    norm: str | Callable[..., nn.Module],
    *,
    from_norms: Sequence[str] = PRESERVED,
    where: Callable[[str], bool] | None = None,
    example_input: Any = None,
    **options,
) -> nn.Module:
    """
    Makes the norms of a model norms of another kind, in place, as `convert_sync_batchnorm` does.

    The function is preserved, in evaluation for every kind and in training from the first step for MABN: see
    :func:`import_batch_norm`. The parameters stay the same objects, so an optimizer keeps its hold on them;
    those of a frozen norm become parameters. A MABN makes the convolution in front of it centralized; with
    other norms it becomes an ordinary one again.

    A norm that cannot be converted rightly stays. What is converted, what stays and why is logged by name;
    see :func:`convertible_sites`.

    Args:
        model: any module.
        norm: a name of `NORMS`, or a class or function like them, called with the number of channels.
        from_norms: kinds that are converted. "GN" and "LN" (over channels and pixels of a 4-D tensor) lose
            their function: their γ and β are kept.
        where: which names of norms are meant; all by default.
        example_input: the argument of the model, a tuple being several: for models whose structure leaves
            open which convolution feeds which norm.
        options: of the new norms. `eps` is by default that of the old norm.

    Returns:
        the model; a new module if the model itself is a norm.

    Raises:
        ValueError: a name is unknown, or an option out of its range.
    """
    make = _find(norm)
    name = norm if isinstance(norm, str) else make.__name__
    plan = _plan(model, make, from_norms, where, example_input)
    converted = [step for step in plan if not step.reason]
    for step in converted:
        for old in step.norms:
            new = _convert(old, step, make, options)
            if old is model:
                model = new
            replace_module(model, old, new)
        for site in step.sites:
            if site.convolution is not None and not getattr(
                make, "needs_centralized_kernel", False
            ):
                decentralize(site.convolution)
    logger.info("convert: %d of %d norms are now %s", len(converted), len(plan), name)
    for step in plan:
        kind = type(step.norms[0]).__name__
        for note in step.notes:
            logger.warning("convert: %s (%s): %s", step.sites[0].norm_name, kind, note)
        if step.reason:
            logger.warning("convert: %s (%s) stays: %s", step.sites[0].norm_name, kind, step.reason)
    return model


def convertible_sites(
    model: nn.Module,
    norm: str | Callable[..., nn.Module],
    *,
    from_norms: Sequence[str] = PRESERVED,
    where: Callable[[str], bool] | None = None,
    example_input: Any = None,
) -> list[NormSite]:
    """
    What :func:`convert` does with each norm of a model, with the same arguments.

    Returns:
        the sites of every norm, with an empty `reason` where it is converted.
    """
    plan = _plan(model, _find(norm), from_norms, where, example_input)
    return [site._replace(reason=step.reason) for step in plan for site in step.sites]


class _Step(NamedTuple):
    sites: list[NormSite]
    norms: list[nn.Module]  # one, or one per feature level
    reason: str  # why it stays, empty if it is converted
    notes: list[str]


def _find(norm: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if isinstance(norm, str) and norm not in NORMS:
        raise ValueError(
            f"norm: {norm!r} is not known, accepted are {', '.join(NORMS)}, or a class"
        )
    return NORMS[norm] if isinstance(norm, str) else norm


def _plan(
    model: nn.Module,
    make: Callable[..., nn.Module],
    from_norms: Sequence[str],
    where: Callable[[str], bool] | None,
    example_input: Any,
) -> list[_Step]:
    unknown = set(from_norms) - {*PRESERVED, "GN", "LN"}
    if unknown:
        accepted = ", ".join((*PRESERVED, "GN", "LN"))
        raise ValueError(
            f"from_norms: {', '.join(sorted(unknown))} is not known, accepted are {accepted}"
        )
    sites_of: dict[str, list[NormSite]] = {}
    for site in find_norm_sites(model, is_norm, example_input):
        sites_of.setdefault(site.norm_name, []).append(site)
    centralizes = getattr(make, "needs_centralized_kernel", False)

    steps = []
    for name, sites in sites_of.items():
        norms = list(sites[0].norm) if are_levels(sites[0].norm) else [sites[0].norm]
        if all(type(norm) is make for norm in norms):
            continue
        kind, notes = kind_of(norms[0]), []
        if kind not in from_norms:
            reason = f"{kind} is not among from_norms"
        elif where is not None and not where(name):
            reason = "its name is not asked for"
        else:
            reason = _reason_to_leave(norms[0], sites, kind)
            for site in sites if centralizes else ():
                reason = reason or _reason_not_to_centralize(site)
        if not reason:
            if kind not in PRESERVED:
                notes.append("function not preserved")
            for site in sites if centralizes else ():
                if not can_be_centralized(site.convolution):
                    what = f"each filter of {site.convolution_name} has one element"
                    notes.append(f"{what}, centralized it would be 0: it is not centralized")
                if site.evidence == "order":
                    fed_by = f"{site.convolution_name} is taken for what feeds it"
                    notes.append(f"{fed_by}, by the order of assignment alone")
        steps.append(_Step(sites, norms, reason, notes))
    return steps


def _reason_to_leave(norm: nn.Module, sites: list[NormSite], kind: str) -> str:
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return "its input is not 4-D"
    for site in sites:
        if site.convolution is not None and site.convolution.weight.dim() != 4:
            return f"it is fed by {site.convolution_name}, which is no convolution in 2-D"
    if kind == "LN" and type(norm) is nn.LayerNorm:
        return "it normalizes the last dimensions, not channels in front of pixels"
    if kind not in PRESERVED:
        return ""
    evaluated = evaluation_map(norm, dims=4)
    return evaluated if isinstance(evaluated, str) else ""


def _reason_not_to_centralize(site: NormSite) -> str:
    convolution = site.convolution
    if convolution is None:
        return f"it needs a centralized convolution in front: {site.reason}"
    if type(convolution) in CENTRALIZED_CLASSES or isinstance(convolution, CentralizedKernel):
        return ""
    return f"{site.convolution_name} ({type(convolution).__name__}) cannot be centralized"


def _convert(
    old: nn.Module, step: _Step, make: Callable[..., nn.Module], options: dict[str, Any]
) -> nn.Module:
    """The new norm, with the old one's function and parameters; the convolutions get what it needs."""
    new = _create(old, make, options)
    weight, bias = (getattr(old, name, None) for name in ("weight", "bias"))
    preserved = kind_of(old) in PRESERVED
    then = evaluation_map(old, dims=4).then if preserved else None
    values = [None if value is None else value.detach().clone() for value in (weight, bias)]
    for name, value in [("weight", weight), ("bias", bias)]:
        if isinstance(value, nn.Parameter) and isinstance(getattr(new, name), nn.Parameter):
            setattr(new, name, value)

    for site in step.sites:
        if site.convolution is not None:
            _prepare(site.convolution, new, preserved)
    if preserved:
        import_batch_norm(new, None, *values, old.running_mean, old.running_var, old.eps)
    return new if then is None else nn.Sequential(OrderedDict(norm=new, act=then))


def _create(old: nn.Module, make: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """A new norm with the old one's channels, ε, device, dtype and mode."""
    accepted = inspect.signature(make).parameters
    defaults = {"eps": old.eps} if old.eps > 0 else {}
    if getattr(old, "weight", None) is None:
        defaults["affine"] = False
    is_bn = (nn.BatchNorm2d, nn.SyncBatchNorm)
    if make in is_bn and type(old) in is_bn:
        defaults["momentum"] = old.momentum
    defaults = {key: value for key, value in defaults.items() if key in accepted}
    new = make(num_channels(old), **{**defaults, **options})
    tensors = [getattr(old, "weight", None), getattr(old, "running_var", None)]
    like = next((tensor for tensor in tensors if tensor is not None), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    if "momentum" in defaults and old.num_batches_tracked is not None:
        new.num_batches_tracked.copy_(old.num_batches_tracked)
    return new.train(old.training)


def _prepare(convolution: nn.Module, norm: nn.Module, preserved: bool) -> None:
    """Makes the kernel in use the norm's: the same as before if the function is to be preserved."""
    if not getattr(norm, "needs_centralized_kernel", False):
        decentralize(convolution)
        return
    if getattr(convolution, "centralized", False):
        return
    if not isinstance(convolution, CentralizedKernel):
        centralize_convolution(convolution)
    convolution.centralized = can_be_centralized(convolution)
    if preserved:
        keep_kernel_mean(convolution)
