"""
Tools of other packages that handle BN, and would be wrong about a norm of this package without a word.

They find BN by its class. BRN and MBN are `BatchNorm2d`, which is right for whatever looks at parameters
and evaluation, and wrong for what replaces or re-estimates BN; MABN is none, so it is passed over. Such a
tool, called with a model in which it would go wrong, raises an error that names the norm and what to
use. The table in docs/practice.md has the tools that are right as well.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..layers import CentralizedKernel, Norm2d
from ..utils.replace import replace_everywhere


def _is_our_unfrozen_norm(module: nn.Module) -> bool:
    return isinstance(module, Norm2d) and not module.frozen


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, Norm2d) and isinstance(module, nn.modules.batchnorm._BatchNorm)


def _stays_unfrozen(module: nn.Module) -> bool:
    return _is_our_unfrozen_norm(module) and module.training and not _is_batch_norm(module)


def _has_another_kernel(module: nn.Module) -> bool:
    return isinstance(module, CentralizedKernel) and module.centralized


class _Tool(NamedTuple):
    """A function, or a class method, that would go wrong."""

    module: str
    name: str
    goes_wrong_about: Callable[[nn.Module], bool]
    what: str  # it does
    instead: str


_POPULATION = "run the batches in `with mabn_d2.training.population_statistics(model):`"
_PRECISE = "use mabn_d2.engine.update_norm_statistics, or the trainers of mabn_d2.engine"
_OWN = "its statistics are its point: leave it as it is, or use SyncBatchNorm from the start"
_FREEZE = "call requires_grad_(False) on it first, which freezes it"

TOOLS = [
    _Tool("torch.optim.swa_utils", "update_bn", _is_our_unfrozen_norm,
          "does not update", _POPULATION),
    _Tool("torch.nn.modules.batchnorm", "SyncBatchNorm.convert_sync_batchnorm", _is_batch_norm,
          "would replace", _OWN),
    _Tool("torch.nn.utils.fusion", "fuse_conv_bn_eval", _has_another_kernel,
          "would fold into the raw kernel of", "use mabn_d2.surgery.fold"),
    _Tool("fvcore.nn.precise_bn", "get_bn_modules", _is_our_unfrozen_norm,
          "(update_bn_stats, PreciseBN) does not know", _PRECISE),
    _Tool("detectron2.layers.batch_norm", "FrozenBatchNorm2d.convert_frozen_batchnorm",
          _stays_unfrozen, "does not freeze", _FREEZE),
    _Tool("timm.layers.norm_act", "convert_sync_batchnorm", _is_batch_norm, "would replace", _OWN),
    _Tool("timm.layers.split_batchnorm", "convert_splitbn_model", _is_batch_norm,
          "would replace", _OWN),
    _Tool("timm.layers.norm_act", "freeze_batch_norm_2d", _stays_unfrozen, "does not freeze", _FREEZE),
]  # fmt: skip

# (holder, name) -> what it held, and what it holds now.
_guarded: dict[tuple[Any, str], tuple[Any, Any]] = {}


def guard_bn_tools() -> None:
    """
    Makes the tools that are imported refuse models in which they would go wrong.

    Called when the package is imported; calling it again reaches what was imported since.
    """
    for tool in TOOLS:
        if tool.module not in sys.modules:
            continue
        holder = importlib.import_module(tool.module)
        *classes, name = tool.name.split(".")
        for cls in classes:
            holder = getattr(holder, cls)
        if (holder, name) in _guarded:
            continue
        before = vars(holder)[name]
        if classes:
            after = classmethod(_guard(before.__func__, tool))
            setattr(holder, name, after)
        else:
            after = _guard(before, tool)
            replace_everywhere(before, after)
        _guarded[holder, name] = before, after


def release_bn_tools() -> None:
    """Takes :func:`guard_bn_tools` back."""
    for (holder, name), (before, after) in _guarded.items():
        setattr(holder, name, before)
        if not isinstance(before, classmethod):
            replace_everywhere(after, before)
    _guarded.clear()


def _guard(function: Callable, tool: _Tool) -> Callable:
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, nn.Module):
                _check(argument, tool)
        return function(*args, **kwargs)

    return guarded


def _check(model: nn.Module, tool: _Tool) -> None:
    for name, module in model.named_modules():
        if tool.goes_wrong_about(module):
            where = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(f"{tool.name} {tool.what} {where}: {tool.instead}")
