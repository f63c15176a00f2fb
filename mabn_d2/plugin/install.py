"""
The one place that plugs the norms into Detectron2.

Detectron2 has no registry of norms: `get_norm` looks the name up in a dictionary of its own, and
every module imports that function by name. :func:`install` replaces it wherever it is held.
"""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import detectron2.config
import detectron2.layers
import detectron2.modeling
import detectron2.solver.build
import yacs.config
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer
from detectron2.layers import CycleBatchNormList, DeformConv, ModulatedDeformConv
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import nn
from torch.ao.quantization import ObserverBase

from ..layers import CenConv2d, CentralizedKernel, RingBuffer, marked_options
from ..layers.options import Accepted
from ..surgery import (
    CENTRALIZED_CLASSES,
    centralize,
    centralize_convolution,
    needs_centralized_kernel,
    set_norm_batch_size,
)
from ..training import follow_grad_scaler
from ..training.double_forward import second_forward_contexts
from .config import add_mabn_config
from .registry import (
    check_norm_name,
    is_registered_norm,
    norm_factory,
    norm_options,
    option_of_key,
    options_of_model,
)
from .scaling import scale_config

logger = logging.getLogger(__name__)
# Over how many feature levels the head under construction is shared; 0 outside of such a head.
_num_levels: ContextVar[int] = ContextVar("num_levels", default=0)


class CenDeformConv(CentralizedKernel, DeformConv):
    """Deformable convolution with a centralized kernel."""


class CenModulatedDeformConv(CentralizedKernel, ModulatedDeformConv):
    """Modulated deformable convolution (v2) with a centralized kernel."""


CENTRALIZED_CLASSES.update(
    {
        detectron2.layers.Conv2d: CenConv2d,
        DeformConv: CenDeformConv,
        ModulatedDeformConv: CenModulatedDeformConv,
    }
)
# fvcore's checkpointer drops tensors of another shape, but for modules that adapt what they load. It knows
# those by this class; a ring buffer is resampled.
ObserverBase.register(RingBuffer)


def _extend_get_norm(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_norm(norm, out_channels):
        check_norm_name(norm, "The norm")
        create = norm_factory(norm)
        if create is None:
            return original(norm, out_channels)
        if _num_levels.get():
            return CycleBatchNormList(_num_levels.get(), create, num_features=out_channels)
        return create(num_features=out_channels)

    return get_norm


def _extend_get_cfg(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_cfg() -> CfgNode:
        cfg = original()
        add_mabn_config(cfg)
        return cfg

    return get_cfg


def _leave_ranges_to_norm_options(original: Callable) -> Callable:
    """
    For yacs' check of a value that is merged, which refuses the integer 3 where a float stands.

    An option that declares what it accepts is checked by :func:`norm_options`, which says it.
    """

    @functools.wraps(original)
    def check_and_coerce(replacement, value, key, full_key):
        found = option_of_key(full_key)
        if found is None:
            return original(replacement, value, key, full_key)
        if isinstance(value, float) and type(replacement) is int:
            return float(replacement)
        if isinstance(value, tuple) and isinstance(replacement, list):
            return tuple(replacement)
        norm, option = found
        has_range = option in marked_options(norm, Accepted)
        return replacement if has_range else original(replacement, value, key, full_key)

    return check_and_coerce


def _centralize_what_is_built(original: Callable) -> Callable:
    """For functions (config, ...) -> module: passes options to the norms and centralizes."""

    @functools.wraps(original)
    def build(cfg, *args, **kwargs):
        if options_of_model.get() is not None:  # a part of a model under construction
            return original(cfg, *args, **kwargs)
        with _set(options_of_model, _norm_options(cfg)):
            built = original(cfg, *args, **kwargs)
        if isinstance(built, nn.Module):
            centralize(built)
            if isinstance(cfg, CfgNode):
                _split_norm_batches(built, cfg.MODEL.get("NORM_BATCH_SIZE", 0))
        return built

    return build


def _norm_options(cfg) -> dict[str, dict[str, Any]]:
    """Options of each norm, from a config that may be a lazy one."""
    return norm_options(cfg) if isinstance(cfg, CfgNode) and "MODEL" in cfg else {}


def _split_norm_batches(model: nn.Module, size: int) -> None:
    """:func:`set_norm_batch_size` for all norms whose batches are images, not regions of images."""
    if size == 0 or isinstance(model, ROIHeads):
        return
    for child in model.children():
        if not isinstance(child, ROIHeads):
            set_norm_batch_size(child, size)


def _share_over_levels(original: Callable) -> Callable:
    """
    For the constructor of a head that is run on every feature level in turn.

    Detectron2 gives BN in such a head statistics per level, by the name "BN". Ours get the same.
    """

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        input_shape = kwargs["input_shape"] if "input_shape" in kwargs else args[-1]
        with _set(_num_levels, len(input_shape)):
            original(self, *args, **kwargs)
        centralize(self)

    return init


def _centralize_in_constructor(original: Callable) -> Callable:
    """For the constructor of a convolution that takes the norm behind it."""

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if needs_centralized_kernel(self.norm) and type(self) in CENTRALIZED_CLASSES:
            centralize_convolution(self)

    return init


def _scale_norms_too(original: Callable) -> Callable:
    """For `DefaultTrainer.auto_scale_workers`, which scales the schedule to the number of workers."""

    @functools.wraps(original)
    def auto_scale_workers(cfg, num_workers):
        return scale_config(cfg, num_workers, original)

    return auto_scale_workers


def _announce_grad_scaler(original: Callable) -> Callable:
    """For the constructor of `AMPTrainer`."""

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        follow_grad_scaler(self.model, self.grad_scaler)

    return init


def _decay_like_other_norms(original: Callable) -> Callable:
    """
    For `get_default_optimizer_params`, which knows Detectron2's norms by their types.
    """

    @functools.wraps(original)
    def get_default_optimizer_params(*args, **kwargs) -> list[dict[str, Any]]:
        groups = original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        decay = given.arguments["weight_decay_norm"]
        if decay is None:
            return groups
        by_name = dict(given.arguments["overrides"] or {})
        if given.arguments["weight_decay_bias"] is not None:
            by_name["bias"] = {"weight_decay": given.arguments["weight_decay_bias"]}
        decayed_by_name = {name for name, values in by_name.items() if "weight_decay" in values}
        ours = {
            parameter
            for module in given.arguments["model"].modules()
            if is_registered_norm(module)
            for name, parameter in module.named_parameters()
            if name.split(".")[-1] not in decayed_by_name
        }
        return [part for group in groups for part in _split(group, ours, decay)]

    return get_default_optimizer_params


def _split(group: dict[str, Any], norms: set, weight_decay: float) -> Iterator[dict[str, Any]]:
    """A group of optimizer parameters as one without the norms and one of the norms alone."""
    for is_norm in (False, True):
        chosen = [i for i, p in enumerate(group["params"]) if (p in norms) == is_norm]
        if chosen:
            part = {**group, "params": [group["params"][i] for i in chosen]}
            if "param_names" in group:
                part["param_names"] = [group["param_names"][i] for i in chosen]
            if is_norm:
                part["weight_decay"] = weight_decay
            yield part


@contextlib.contextmanager
def _events_dropped() -> Iterator[None]:
    """An event storage that nobody reads takes the place of the loop's."""
    with EventStorage(get_event_storage().iter if has_event_storage() else 0):
        yield


@contextlib.contextmanager
def _set(variable: ContextVar, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _replace_everywhere(old: Callable, new: Callable) -> None:
    """Replaces a function in every imported module that holds it, under whatever name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                logger.debug("%s.%s is replaced", module.__name__, name)
                setattr(module, name, new)


_replaced_functions: dict[Callable, Callable] = {}
_replaced_methods: dict[tuple[type, str], Any] = {}


def install() -> None:
    """
    Makes the registered norms known wherever Detectron2 takes the name of a norm.

    Called when the package is imported. Calling it again also reaches what was imported since.
    """
    if not _replaced_functions:
        second_forward_contexts.append(_events_dropped)
        for original, extend in [
            (detectron2.config.get_cfg, _extend_get_cfg),
            (yacs.config._check_and_coerce_cfg_value_type, _leave_ranges_to_norm_options),
            (detectron2.layers.get_norm, _extend_get_norm),
            (detectron2.modeling.build_model, _centralize_what_is_built),
            (detectron2.modeling.build_backbone, _centralize_what_is_built),
            (detectron2.modeling.build_proposal_generator, _centralize_what_is_built),
            (detectron2.modeling.build_roi_heads, _centralize_what_is_built),
            (detectron2.modeling.build_sem_seg_head, _centralize_what_is_built),
            (detectron2.config.instantiate, _centralize_what_is_built),
            (detectron2.solver.build.get_default_optimizer_params, _decay_like_other_norms),
        ]:
            _replaced_functions[original] = extend(original)
        for cls, name, extend in [
            (detectron2.layers.Conv2d, "__init__", _centralize_in_constructor),
            (DeformConv, "__init__", _centralize_in_constructor),
            (ModulatedDeformConv, "__init__", _centralize_in_constructor),
            (RetinaNetHead, "__init__", _share_over_levels),
            (AMPTrainer, "__init__", _announce_grad_scaler),
            (DefaultTrainer, "auto_scale_workers", _scale_norms_too),
        ]:
            method = inspect.getattr_static(cls, name)
            _replaced_methods[cls, name] = method
            is_static = isinstance(method, staticmethod)
            extended = extend(getattr(cls, name))
            setattr(cls, name, staticmethod(extended) if is_static else extended)
    for original, replacement in _replaced_functions.items():
        _replace_everywhere(original, replacement)


def uninstall() -> None:
    """Gives Detectron2 its own functions back. Models built before stay as they are."""
    for original, replacement in _replaced_functions.items():
        _replace_everywhere(replacement, original)
    for (cls, name), method in _replaced_methods.items():
        setattr(cls, name, method)
    if _replaced_functions:
        second_forward_contexts.remove(_events_dropped)
    _replaced_functions.clear()
    _replaced_methods.clear()
