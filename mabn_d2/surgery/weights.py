"""Weights of networks with other norms for a model of this package, with the function that they had."""

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..layers import BRN2d, CentralizedKernel, MABN2d, MBN2d, centralize_kernel
from ..layers.centralized_conv import kernel_mean
from ..layers.importing import EPS, is_affine, is_of_mabn
from ..training.population import input_moments
from .importing import import_batch_norm
from .sites import NormSite, are_levels, find_norm_sites, num_channels


class Imported(NamedTuple):
    """
    Weights of other norms as those of a model.

    Attributes:
        state_dict: what the model is to load. Entries that concern no imported norm are what they were.
        with_statistics: names of the norms that have the function of a norm with statistics.
        affine: names of those that have the function of an affine map whose statistics are not known.
        refused: name of a norm that stays as it was -> why.
    """

    state_dict: dict[str, torch.Tensor]
    with_statistics: list[str]
    affine: list[str]
    refused: dict[str, str]

    def __str__(self) -> str:
        return (
            f"the function of {len(self.with_statistics)} norms with statistics and of "
            f"{len(self.affine)} affine maps is kept"
        )


class _Source(NamedTuple):
    """What stood behind a convolution: γ·(x - μ) / sqrt(σ² + ε) + β in evaluation."""

    weight: torch.Tensor | None  # (C,)
    bias: torch.Tensor | None
    mean: torch.Tensor  # (levels, C), one level but for a norm with statistics per feature level
    var: torch.Tensor
    eps: float
    has_statistics: bool = True
    centralized: bool = False  # whether the kernel was


def from_bn(
    model: nn.Module,
    source: nn.Module | Mapping[str, torch.Tensor],
    batches: Iterable | None = None,
    *,
    eps: float = EPS,
    folded: bool = True,
) -> Imported:
    """
    Loads the weights of the same network with other norms, such that its function stays what it is.

    In evaluation it does for every norm that evaluates to BN's formula; in training it does from the first
    step for a MABN, and for a BRN where r and d are not clipped.

    Args:
        model: with MABN, BRN, MBN, or BN for weights of a MABN. Changed in place.
        source: the model that was trained, or its state dict, under the names of the model.
        batches: arguments of the model in training; needed where the source holds no statistics, as in an
            affine map or a bias behind a convolution. Without them such norms are right in evaluation,
            and in training their statistics start at 0 and 1.
        eps: ε of the source's norms if it is a state dict.
        folded: whether γ and β without statistics are those of a BN, not of a GN.

    Returns:
        what was done. Its `affine` are the norms that have their statistics from the batches.

    Raises:
        RuntimeError: of `load_state_dict`, the names or shapes are others.
        ValueError: a norm cannot take up the function.
    """
    epsilons: float | dict[str, float] = eps
    if isinstance(source, nn.Module):
        norms = source.named_modules()
        epsilons = {name: norm.eps for name, norm in norms if hasattr(norm, "eps")}
        source = source.state_dict()
    imported = import_state_dict(model, source, folded=folded, eps=epsilons)
    for name, reason in imported.refused.items():
        raise ValueError(f"{name}: {reason}")
    model.load_state_dict(imported.state_dict)
    if batches is not None:
        measure_statistics(model, imported.affine, batches)
    return imported


@torch.no_grad()
def import_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    folded: bool,
    eps: float | Mapping[str, float] = EPS,
) -> Imported:
    """
    The state dict of :func:`from_bn`, for a model that is not changed.

    What the source has for a norm is told by its entries: MABN's, BN's (those of FrozenBN, SyncBN and BRN),
    γ and β alone, or none and perhaps a bias of the convolution. The last two are affine maps, and so is a
    FrozenBN of mean 0 and variance 1, as Detectron2 saves what it loaded from Caffe2. As long as
    :func:`measure_statistics` was not called, their statistics are 0 and 1, which is exact in evaluation.

    Args:
        model, folded: as there.
        state_dict: under the names of the model. It may lack parts of it, or hold more.
        eps: ε of the source's norms, or of each by name.
    """
    result = dict(state_dict)
    imported = Imported(result, [], [], {})
    sites_of: dict[str, list[NormSite]] = {}
    for site in find_norm_sites(model, has_statistics):
        sites_of.setdefault(site.norm_name, []).append(site)
    for name, sites in sites_of.items():
        own_eps = eps.get(name, EPS) if isinstance(eps, Mapping) else eps
        source = _read(state_dict, name, sites, folded, own_eps)
        if source is None:
            continue
        try:
            entries = {
                **_norm_entries(name, sites[0].norm, source),
                **_kernels(state_dict, sites, source),
            }
        except ValueError as error:
            imported.refused[name] = str(error)
            continue
        taken = [key for key in result if key.startswith(f"{name}.")]
        for site in sites:
            if source.centralized:
                taken.append(f"{site.convolution_name}.kernel_mean")
            elif getattr(site.convolution, "bias", None) is None and not source.has_statistics:
                taken.append(f"{site.convolution_name}.bias")
        for key in taken:
            result.pop(key, None)
        result.update(entries)
        (imported.with_statistics if source.has_statistics else imported.affine).append(name)
    return imported


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm with BN's running statistics."""
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(map(torch.is_tensor, statistics))


def _levels(name: str, norm: nn.Module) -> dict[str, nn.Module]:
    """The norm under its name, or those of a list of norms, one per feature level."""
    if are_levels(norm, has_statistics):
        return {f"{name}.{i}": level for i, level in enumerate(norm.children())}
    return {name: norm}


def _read(
    state_dict: Mapping[str, torch.Tensor],
    name: str,
    sites: list[NormSite],
    folded: bool,
    eps: float,
) -> _Source | None:
    """What a source has for a norm; None where that is left to ordinary loading."""
    levels = _levels(name, sites[0].norm)
    first, norm = next(iter(levels.items()))
    channels, is_ours = num_channels(norm), isinstance(norm, (MABN2d, BRN2d, MBN2d))

    def vector(key: str) -> torch.Tensor | None:
        value = state_dict.get(key)
        return value.flatten() if value is not None and value.numel() == channels else None

    def of_levels(entry: str) -> torch.Tensor | None:
        values = [vector(f"{level}.{entry}") for level in levels]
        return None if any(value is None for value in values) else torch.stack(values)

    def affine(weight: torch.Tensor | None, bias: torch.Tensor | None) -> _Source:
        zeros = torch.zeros(len(levels), channels, device=norm.running_var.device)
        return _Source(weight, bias, zeros, zeros + 1, eps=0.0, has_statistics=False)

    weight, bias = vector(f"{name}.weight"), vector(f"{name}.bias")
    mean, var = of_levels("running_mean"), of_levels("running_var")
    if var is not None:
        is_mabn = is_of_mabn(state_dict, f"{first}.")
        if mean is None and not is_mabn:
            return None
        if _is_its_own(norm, state_dict, first, is_mabn):
            return None
        mean = torch.zeros_like(var) if mean is None else mean
        if not is_mabn and is_affine(mean, var):
            scale = (var[0].double() + eps).rsqrt()
            return affine(scale if weight is None else weight.double() * scale, bias)
        return _Source(weight, bias, mean, var, eps, centralized=is_mabn)
    if weight is not None and bias is not None:
        return affine(weight, bias) if folded and is_ours else None
    if not all(f"{site.convolution_name}.weight" in state_dict for site in sites):
        return None
    biases = {
        site.convolution_name: vector(f"{site.convolution_name}.bias")
        for site in sites
        if getattr(site.convolution, "bias", None) is None  # else it stays where it is
    }
    bias = next(iter(biases.values()), None)
    if len(biases) > 1 or not (is_ours or bias is not None):
        return None
    return affine(None, bias)


def _is_its_own(
    norm: nn.Module, state_dict: Mapping[str, torch.Tensor], name: str, is_mabn: bool
) -> bool:
    """Whether the entries under a name can be those of such a norm, so that there is nothing to import."""
    if is_mabn or isinstance(norm, MABN2d):
        return is_mabn and isinstance(norm, MABN2d)
    if isinstance(norm, MBN2d):
        return f"{name}.memory.count" in state_dict
    # A BRN's entries are those of a BN that has counted.
    return not isinstance(norm, BRN2d) or f"{name}.num_batches_tracked" in state_dict


def _norm_entries(name: str, norm: nn.Module, source: _Source) -> dict[str, torch.Tensor]:
    """The state of a norm, or of a list of norms that share γ and β, with a source's function."""
    levels = _levels(name, norm)
    weight, bias = source.weight, source.bias
    entries = {}
    if are_levels(norm, has_statistics) and norm[0].weight is None:
        own = {key: value for key, value in norm.state_dict().items() if key in ("weight", "bias")}
        for (key, default), value in zip(own.items(), (weight, bias)):
            fresh = torch.ones_like(default) if key == "weight" else torch.zeros_like(default)
            entries[f"{name}.{key}"] = fresh if value is None else value.to(default)
        weight, bias = (None, None) if own else (weight, bias)
    for (level, module), mean, var in zip(levels.items(), source.mean, source.var):
        new = copy.deepcopy(module)
        import_batch_norm(new, None, weight, bias, mean, var, source.eps)
        entries.update({f"{level}.{key}": value for key, value in new.state_dict().items()})
    return entries


def _kernels(
    state_dict: Mapping[str, torch.Tensor], sites: list[NormSite], source: _Source
) -> dict[str, torch.Tensor]:
    """The convolutions in front of a norm, such that the kernels in use are the source's."""
    entries = {}
    for site in sites:
        name, convolution = site.convolution_name, site.convolution
        kernel = state_dict.get(f"{name}.weight")
        if convolution is None or kernel is None or kernel.shape != convolution.weight.shape:
            continue
        if source.centralized and kernel.numel() > convolution.out_channels:
            if getattr(convolution, "transposed", False):
                raise ValueError(f"{name} is a transposed convolution with a centralized kernel")
            kernel = centralize_kernel(kernel, state_dict.get(f"{name}.kernel_mean"))
            entries[f"{name}.weight"] = kernel
        if isinstance(convolution, CentralizedKernel):
            mean = kernel_mean(convolution, kernel.double())
            entries[f"{name}.kernel_mean"] = mean if convolution.centralized else 0 * mean
    return entries


@torch.no_grad()
def measure_statistics(model: nn.Module, names: Collection[str], batches: Iterable) -> list[str]:
    """
    Gives norms the statistics of their input in training, and γ and β such that no output changes.

    All norms of the model are in evaluation for it. Where PyTorch's process group is initialized, the
    statistics are those of the batches of all workers. Norms of feature levels that share γ and β all get the
    moments of the levels together, each level counting the same.

    Args:
        model: called with each batch in training mode.
        names: of norms that evaluate to BN's formula, or of lists of them, one per feature level.
        batches: what the model takes.

    Returns:
        names of the norms that saw nothing, or that have no γ and β: they stay what they were.
    """
    norms = {name: model.get_submodule(name) for name in names}
    left = [name for name, norm in norms.items() if getattr(norm, "weight", None) is None]
    levels = {name: _levels(name, norm) for name, norm in norms.items() if name not in left}
    single = {name: level for group in levels.values() for name, level in group.items()}
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if has_statistics(module):
            module.training = False
    try:
        with input_moments(single) as moments:
            for batch in batches:
                model(batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for name, group in levels.items():
        seen = [moments[level] for level in group if level in moments]
        if not seen:
            left.append(name)
            continue
        norm, first = norms[name], next(iter(group.values()))  # the levels have one function as yet
        means, variances = map(torch.stack, zip(*seen))
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        # About another mean μ and variance σ², γ and β are
        scale = norm.weight.double() / (first.running_var.double() + first.eps).sqrt()
        weight = scale * (var + first.eps).sqrt()
        bias = norm.bias.double() + scale * (mean - first.running_mean)
        moments_of_all = mean.expand(len(group), -1), var.expand(len(group), -1)
        entries = _norm_entries(name, norm, _Source(weight, bias, *moments_of_all, first.eps))
        norm.load_state_dict({key[len(name) + 1 :]: value for key, value in entries.items()})
    return left
