"""
Which convolution feeds which norm. For any PyTorch model.

The evidence, in this order: a norm that stands inside of its convolution (Detectron2's
`Conv2d(norm=...)`); an example input that is run through the model; the forward functions, read by `torch.fx` in the largest
parts of the model that it can trace; and where it cannot, the order in which a module's children were
assigned, if that leaves one way to read it.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from ..layers import CentralizedKernel

# Modules between a convolution and its norm that evaluate to their input.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)
# What a forward may ask of a tensor without using its values.
_METADATA = {"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point"}


class NormSite(NamedTuple):
    """
    A norm with a convolution that feeds it, None where there is none to be found.

    A norm that is called several times has as many sites as there are convolutions that feed it.
    """

    norm_name: str
    norm: nn.Module
    convolution_name: str | None
    convolution: nn.Module | None
    evidence: str = ""  # "example", "inside", "forward" or "order"
    # Why there is no convolution, or what stands against folding the norm into it; else empty.
    reason: str = ""

    @property
    def centralized(self) -> bool:
        """Whether the norm gets what it needs."""
        return isinstance(self.convolution, CentralizedKernel) and self.convolution.centralized


def needs_centralized_kernel(module: nn.Module) -> bool:
    """Whether the module is a norm like MABN, which does not center its input."""
    return getattr(module, "needs_centralized_kernel", False)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalization of any kind: ours, PyTorch's, or one that looks like them."""
    if isinstance(module, (_NormBase, nn.GroupNorm)) or hasattr(module, "normalized_shape"):
        return True
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return needs_centralized_kernel(module) or all(map(torch.is_tensor, statistics))


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear layer: its parameter `weight` is a kernel."""
    dims = len(getattr(getattr(module, "weight", None), "shape", ()))
    return dims > 1 and (hasattr(module, "out_channels") or hasattr(module, "out_features"))


def out_channels(convolution: nn.Module) -> int:
    """Channels of a convolution's or linear layer's output."""
    linear = getattr(convolution, "out_features", None)
    return convolution.out_channels if linear is None else linear


def are_levels(module: nn.Module, is_norm: Callable[[nn.Module], bool] = is_norm) -> bool:
    """Whether the module is a list of norms, one per feature level, that is called like a norm."""
    is_list = isinstance(module, nn.ModuleList) and _has_forward(module)
    return is_list and len(module) > 0 and all(map(is_norm, module))


def num_channels(norm: nn.Module) -> int | None:
    """Channels of a norm, or of a list of norms; None if it does not tell."""
    if isinstance(norm, nn.ModuleList):
        return num_channels(norm[0])
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return getattr(norm, name)
    vector = getattr(norm, "running_var", getattr(norm, "weight", None))
    return None if vector is None else vector.numel()


def find_norm_sites(
    model: nn.Module,
    is_norm: Callable[[nn.Module], bool] = needs_centralized_kernel,
    example_input: Any = None,
) -> list[NormSite]:
    """
    Every norm of a model with the convolution in front of it. The model is not changed.

    Args:
        model: any module.
        is_norm: which modules are meant. A list of them, one per feature level, that is called like a
            norm is one norm.
        example_input: the argument of the model, a tuple being several. It is run in evaluation mode
            without gradient, and is what decides for the norms that are called in it.
    """
    names = {module: name for name, module in model.named_modules()}
    levels = [module for module in names if are_levels(module, is_norm)]
    in_levels = {norm for norms in levels for norm in norms}
    wanted = {
        names[module]: module
        for module in names
        if module in levels or (is_norm(module) and module not in in_levels)
    }
    if not wanted:
        return []

    flow = _by_order(model)
    flow.update(_by_forward(model))
    if example_input is not None:
        flow.update(_by_example(model, example_input))
    flow.update(_by_standing_inside(model))

    sites = []
    for name, norm in wanted.items():
        for fed_by, evidence, reason in flow.calls.get(name, [(None, "", _UNKNOWN)]):
            convolution = None if fed_by is None else model.get_submodule(fed_by)
            if fed_by is not None and out_channels(convolution) != num_channels(norm):
                reason = f"{fed_by} has another number of channels"
                fed_by = convolution = None
            elif fed_by in flow.used_elsewhere and evidence != "inside":
                reason = f"the output of {fed_by} is used elsewhere, too"
            sites.append(NormSite(name, norm, fed_by, convolution, evidence, reason))
    return sites


_UNKNOWN = "no convolution was found in front of it; an example input may tell"


class _Flow:
    """What is known about the way from convolutions to norms, by name."""

    def __init__(self):
        self.calls: dict[str, list[tuple[str | None, str, str]]] = {}
        self.used_elsewhere: set[str] = set()

    def add(self, norm: str, convolution: str | None, evidence: str, reason: str = "") -> None:
        """A call of a norm. Equal calls count once."""
        call = (convolution, evidence, reason)
        calls = self.calls.setdefault(norm, [])
        if call not in calls:
            calls.append(call)

    def update(self, better: "_Flow") -> None:
        """Takes over what better evidence says."""
        self.calls.update(better.calls)
        self.used_elsewhere |= better.used_elsewhere


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _is_called_as_a_norm(module: nn.Module) -> bool:
    return is_norm(module) or are_levels(module)


def _is_bare(convolution: nn.Module) -> bool:
    """Whether its output is the convolution's, not that of a norm or activation inside of it."""
    inside = [getattr(convolution, name, None) for name in ("norm", "activation")]
    return inside == [None, None]


def _part(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


# ---- inside of the convolution -------------------------------------------------------------------


def _by_standing_inside(model: nn.Module) -> _Flow:
    flow = _Flow()
    for name, module in model.named_modules():
        if is_convolution(module) and isinstance(getattr(module, "norm", None), nn.Module):
            flow.add(_part(name, "norm"), name, "inside")
    return flow


# ---- the order of assignment ---------------------------------------------------------------------


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of what the module's forward may call: containers are looked into."""
    for child_name, child in module.named_children():
        if _has_forward(child):
            yield _part(name, child_name), child
        else:
            yield from _children(child, _part(name, child_name))


def _by_order(model: nn.Module) -> _Flow:
    flow = _Flow()
    for name, module in model.named_modules():
        if not _has_forward(module) or _is_called_as_a_norm(module):
            continue
        line = [
            (child_name, _is_called_as_a_norm(child))
            for child_name, child in _children(module, name)
            if _is_called_as_a_norm(child) or is_convolution(child)
        ]
        for i, (norm, stands_for_norm) in enumerate(line):
            if stands_for_norm:
                flow.add(norm, *_read_order(line, i))
    return flow


def _read_order(line: list[tuple[str, bool]], i: int) -> tuple[str | None, str, str]:
    """The convolution in front of number i among convolutions and norms as (name, is a norm)."""
    start = end = i
    while start > 0 and line[start - 1][1]:
        start -= 1
    while end + 1 < len(line) and line[end + 1][1]:
        end += 1
    if start == 0:
        return None, "", _UNKNOWN
    convolutions = start
    while convolutions > 0 and not line[convolutions - 1][1]:
        convolutions -= 1
    if start != end or start - convolutions > 1:
        order = ", ".join(name.rpartition(".")[2] for name, _ in line[convolutions : end + 1])
        return None, "", f"the order {order} is ambiguous; an example input tells"
    return line[i - 1][0], "order", ""


# ---- the forward functions -----------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Keeps convolutions and norms whole; if shallow, every module but a `Sequential`."""

    def __init__(self, root: nn.Module, shallow: bool):
        super().__init__()
        self._shallow = shallow
        self._whole = {  # told before parameters become proxies
            module
            for module in root.modules()
            if is_convolution(module) or _is_called_as_a_norm(module)
        }

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if module in self._whole:
            return True
        if self._shallow:
            return type(module).forward is not nn.Sequential.forward
        return super().is_leaf_module(module, name)


def _by_forward(model: nn.Module) -> _Flow:
    flow = _Flow()
    tensors = [*model.parameters(), *model.buffers()]
    try:  # a copy of the structure: a forward may change what it belongs to
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    except Exception:  # of any type: what the modules hold is foreign
        return flow
    names = {module: name for name, module in model.named_modules()}
    _read_forward(model, names, flow)
    return flow


def _read_forward(module: nn.Module, names: dict[nn.Module, str], flow: _Flow) -> None:
    if is_convolution(module) or _is_called_as_a_norm(module):
        return
    norms = [part for part in module.modules() if _is_called_as_a_norm(part)]
    if all(names[norm] in flow.calls for norm in norms):
        return
    for shallow in (False, True):
        try:
            graph = _Tracer(module, shallow).trace(module)
        except Exception:  # of any type: a forward is foreign code, and does not expect proxies
            continue
        _read_graph(graph, module, names, flow)
        break
    for _, child in _children(module, ""):
        _read_forward(child, names, flow)


def _read_graph(graph: fx.Graph, root: nn.Module, names: dict[nn.Module, str], flow: _Flow) -> None:
    def module_of(node):
        return root.get_submodule(node.target) if node.op == "call_module" else None

    def is_transparent(node):
        return isinstance(module_of(node), _TRANSPARENT)

    feeds_a_norm = set()
    for node in graph.nodes:
        norm = module_of(node)
        if norm is None or not _is_called_as_a_norm(norm):
            continue
        source, users = node.all_input_nodes[0], 1
        while is_transparent(source):
            users = max(users, len(source.users))
            source = source.all_input_nodes[0]
        users = max(users, len(source.users))
        convolution = module_of(source)
        if convolution is not None and is_convolution(convolution) and _is_bare(convolution):
            flow.add(names[norm], names[convolution], "forward")
            if users == 1:
                feeds_a_norm.add(source)
        else:
            flow.add(names[norm], None, "forward", _describe(source, convolution, root))
    for node in graph.nodes:
        module = module_of(node)
        if module is not None and is_convolution(module) and node not in feeds_a_norm:
            flow.used_elsewhere.add(names[module])


def _describe(source: fx.Node, module: nn.Module | None, root: nn.Module) -> str:
    if source.op == "placeholder":
        return f"it is given the input of its {type(root).__name__}; an example input may tell"
    if module is not None:
        return f"it is fed by {source.target} ({type(module).__name__})"
    return f"it is fed by {getattr(source.target, '__name__', source.target)}"


# ---- an example ----------------------------------------------------------------------------------


class _Uses(TorchFunctionMode):
    """Sees which outputs of convolutions are used by other functions than norms."""

    def __init__(self, outputs: dict[int, tuple[torch.Tensor, str]], used: set[str]):
        super().__init__()
        self.outputs, self.used, self.depth = outputs, used, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.depth == 0 and func.__name__ not in _METADATA:
            for value in tree_flatten((args, kwargs))[0]:
                if id(value) in self.outputs:
                    self.used.add(self.outputs[id(value)][1])
        return func(*args, **(kwargs or {}))


def _by_example(model: nn.Module, example_input: Any) -> _Flow:
    flow = _Flow()
    outputs: dict[int, tuple[torch.Tensor, str]] = {}  # the tensors are kept, so ids stay unique
    uses = _Uses(outputs, flow.used_elsewhere)
    handles = []

    def enter(module, args):
        uses.depth += 1

    def leave(module, args, out):
        uses.depth -= 1

    for name, module in model.named_modules():
        if _is_called_as_a_norm(module):

            def see(module, args, name=name):
                _, fed_by = outputs.get(id(args[0]), (None, None))
                reason = "" if fed_by else "what it is fed by is no convolution's output"
                flow.add(name, fed_by, "example", reason)

            handles.append(module.register_forward_pre_hook(see))
        elif is_convolution(module) and _is_bare(module):

            def remember(module, args, out, name=name):
                outputs[id(out)] = out, name

            handles.append(module.register_forward_hook(remember))
        if isinstance(module, _TRANSPARENT):

            def pass_on(module, args, out):
                if id(args[0]) in outputs:
                    outputs[id(out)] = out, outputs[id(args[0])][1]

            handles.append(module.register_forward_hook(pass_on))
        if isinstance(module, _TRANSPARENT) or _is_called_as_a_norm(module):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    modes = {module: module.training for module in model.modules()}
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with torch.no_grad(), uses:
            model.eval()(*arguments)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return flow
