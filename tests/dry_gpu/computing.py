"""
Results for the operators that run on the dry GPU, computed on the CPU.

The device's memory is the host's, so each operator is called twice: on the CUDA tensors, whose kernels are
recorded and not run, and on CPU tensors over the same memory. The results are those of the CPU's kernels.
"""

import contextlib
import ctypes
import mmap
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map

from .library import set_answers

aten = torch.ops.aten

# They touch no values, or they are about where memory is.
_WITHOUT_VALUES = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "resize_as_",
    "record_stream", "is_pinned", "_pin_memory", "pin_memory", "lift_fresh", "detach_", "_nested_tensor_size",
    "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "is_same_size",
}  # fmt: skip
_RANDOM = (
    "rand", "normal", "uniform", "bernoulli", "dropout", "multinomial", "exponential", "poisson",
)  # fmt: skip
_LOW_PRECISION = (torch.float16, torch.bfloat16)
# What the CPU does in low precision only slowly.
_IN_FLOAT32 = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}


def compute(maps: bool = True):
    """A :class:`Compute`; nothing where one is active in this thread, a second would add twice in place."""
    active = any(isinstance(mode, Compute) for mode in _get_current_dispatch_mode_stack())
    return contextlib.nullcontext() if active else Compute(maps)


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a tensor on the dry GPU."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size()
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=size)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Compute(TorchDispatchMode):
    """
    Inside, every operator on the dry GPU has the CPU's result.

    Random operators follow the seed and offset of the CUDA generator, but are not the GPU's. An operator
    that the CPU does not have keeps an undefined result, with one warning that names it.

    Without `maps`, nothing is computed where a tensor of more than three dimensions takes part: what such
    an operator returns is zero, and takes no memory of the host. A detector then still chooses among its
    boxes, at the size of real training.
    """

    def __init__(self, maps: bool = True):
        super().__init__()
        self._maps = maps
        self._warned = set()

    def __enter__(self):
        self._print = torch._tensor_str._str
        torch._tensor_str._str = self._print_from_host  # which leaves the mode otherwise
        return super().__enter__()

    def __exit__(self, *exception):
        torch._tensor_str._str = self._print
        return super().__exit__(*exception)

    def _print_from_host(self, tensor, **kwargs):
        if not _is_cuda(tensor) or tensor.layout != torch.strided:
            return self._print(tensor, **kwargs)
        text = self._print(host_view(tensor.detach()), **kwargs)
        return f"{text[:-1]}, device='{tensor.device}')"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        is_on_device = any(
            _is_cuda(a) or (isinstance(a, torch.device) and a.type == "cuda")
            for a in tree_flatten((args, kwargs))[0]
        )
        if not is_on_device or name in _WITHOUT_VALUES or _is_view(func):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return _collective(func, args, kwargs)
        seed = _seed(name)
        # Of a copy to the host, the values are the answer.
        copies = name in ("_local_scalar_dense", "_to_copy", "copy_")
        set_answers(not copies, _counts(name, args))
        try:
            out = func(*args, **kwargs)
        finally:
            set_answers(True)
        if not self._maps and any(_is_map(value) for value in tree_flatten((args, kwargs, out))[0]):
            if not _is_in_place(func):
                tree_map(_clear, out)
            return out
        return self._with_results(func, name, args, kwargs, out, seed)

    def _with_results(self, func, name, args, kwargs, out, seed):
        """`out` with the right values; it is replaced where its shape depends on values."""
        host_args, host_kwargs = tree_map(_to_host, (args, kwargs))
        if kwargs.get("pin_memory"):
            host_kwargs["pin_memory"] = False
        state = torch.default_generator.get_state()
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        try:
            results = _call(func, name, host_args, host_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if func not in self._warned:
                self._warned.add(func)
                text = str(error).strip().splitlines()[0][:200]
                warnings.warn(f"dry_gpu: {func} has no result, the CPU says: {text}", stacklevel=2)
            return out
        finally:
            torch.default_generator.set_state(state)
        return out if _is_in_place(func) else _filled(out, results)


def _filled(out, results):
    if isinstance(out, (tuple, list)):
        return type(out)(_filled(o, r) for o, r in zip(out, results))
    if not isinstance(out, torch.Tensor) or not isinstance(results, torch.Tensor):
        return out if isinstance(out, torch.Tensor) else results
    if out.shape != results.shape:
        out = torch.empty(results.shape, dtype=out.dtype, device=out.device)
    if out.numel():
        (host_view(out) if out.is_cuda else out).copy_(results)
    return out


def _is_map(value: Any) -> bool:
    return _is_cuda(value) and value.dim() > 3


def _clear(value: Any) -> None:
    """Gives the pages of a tensor on the dry GPU back to the system: they read as zeros."""
    if not _is_cuda(value):
        return
    start, size = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    end, page = start + size, mmap.PAGESIZE
    first, last = min(-(-start // page) * page, end), max(end // page * page, start)
    if first < last:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
    else:
        first = last = end
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, end - last)


_libc = ctypes.CDLL(None)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _to_host(value: Any) -> Any:
    if _is_cuda(value):
        return host_view(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return None if isinstance(value, torch.Generator) else value


def _is_view(func) -> bool:
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _is_in_place(func) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def _seed(name: str):
    """A seed for the CPU that follows the dry GPU's generator, None for what is not random."""
    if not any(part in name for part in _RANDOM):
        return None
    return zlib.crc32(bytes(torch.cuda.get_rng_state().tolist()))


def _counts(name: str, args) -> Sequence[int]:
    """The numbers that the operator reads from the device to check its arguments and size its result."""
    if name == "nonzero":
        masks = [args[0]]
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    elif name == "masked_select":
        masks = [args[1]]
    elif name == "repeat_interleave" and _is_cuda(args[0]):
        return [int(host_view(args[0]).sum()), 1]  # none is negative
    else:
        return ()
    return [int(host_view(mask).count_nonzero()) for mask in masks if _is_cuda(mask)]


def _call(func, name: str, args, kwargs):
    """The operator on the CPU, in float32 if the CPU does not have it in low precision."""
    if name in _TWINS:
        return _TWINS[name](*args, **kwargs)
    low = [a for a in tree_flatten((args, kwargs))[0] if _is_low(a)]
    if not low or name not in _IN_FLOAT32:
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if not low:
                raise
    wide = {id(a): a.float() for a in low}
    wide_args, wide_kwargs = tree_map(
        lambda a: wide.get(id(a), a) if _is_low(a) else a, (args, kwargs)
    )
    results = func(*wide_args, **wide_kwargs)
    if _is_in_place(func):
        for a in low:
            a.copy_(wide[id(a)])
    return results


def _is_low(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _LOW_PRECISION


def _collective(func, args, kwargs):
    """A collective operation, once: over the memory that the device's tensors have on the host."""
    out = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
    # The tensors that it writes are its first argument, and are returned where more than its `Work` is.
    return (args[0], *out[1:]) if isinstance(out, (tuple, list)) else out


# Operators that only CUDA has.


def _cudnn_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    out, mean, inv_std = _call(
        aten.native_batch_norm.default, "native_batch_norm",
        (x, weight, bias, running_mean, running_var, training, momentum, eps), {},
    )  # fmt: skip
    return out, mean, inv_std, torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(
    x, d, weight, running_mean, running_var, mean, inv_std, eps, reserve
):
    return _call(
        aten.native_batch_norm_backward.default, "native_batch_norm_backward",
        (d, x, weight, running_mean, running_var, mean, inv_std, True, eps, [True, True, True]), {},
    )  # fmt: skip


def _dims(x):
    return [0, *range(2, x.dim())]


def _per_channel(x, vector):
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _batch_norm_stats(x, eps):
    var, mean = torch.var_mean(_wide(x), _dims(x), unbiased=False)
    return mean, (var + eps).rsqrt()


def _batch_norm_elemt(x, weight, bias, mean, inv_std, eps):
    out = (_wide(x) - _per_channel(x, mean)) * _per_channel(x, inv_std)
    if weight is not None:
        out = out * _per_channel(x, weight)
    return out if bias is None else out + _per_channel(x, bias)


def _batch_norm_backward_reduce(d, x, mean, inv_std, weight, needs_x, needs_weight, needs_bias):
    sum_d = _wide(d).sum(_dims(x))
    sum_dx = (_wide(d) * (_wide(x) - _per_channel(x, mean))).sum(_dims(x))
    return sum_d, sum_dx, sum_dx * inv_std, sum_d


def _batch_norm_backward_elemt(d, x, mean, inv_std, weight, sum_d, sum_dx, count):
    norm = 1 / count.sum()
    centered = _wide(x) - _per_channel(x, mean)
    slope = _per_channel(x, sum_dx * norm * inv_std.square())
    out = (_wide(d) - _per_channel(x, sum_d * norm) - centered * slope) * _per_channel(x, inv_std)
    return out if weight is None else out * _per_channel(x, weight)


_TWINS = {
    "cudnn_batch_norm": _cudnn_batch_norm,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    "batch_norm_stats": _batch_norm_stats,
    "batch_norm_elemt": _batch_norm_elemt,
    "batch_norm_backward_reduce": _batch_norm_backward_reduce,
    "batch_norm_backward_elemt": _batch_norm_backward_elemt,
}
