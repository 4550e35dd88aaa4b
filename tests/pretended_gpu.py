"""A CUDA device that is not there: tensors that say they are on it, with their values on the CPU.

Code that mixes such a tensor with one of the CPU fails, as it would on a GPU: what the CPU cannot
show, a tensor made on the wrong device, is seen without one. Operators with a Triton version run
their CPU version, all others of shardwise their reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from shardwise.ops import combine, interaction, library, offsets, permute, regroup, route

GPU = torch.device("meta")  # the one device besides the CPU for which autograd needs no driver

_REFERENCES = {
    name: value
    for op in (combine, interaction, offsets, permute, regroup, route)
    for name, value in vars(op.reference).items()
}

# On a GPU these take a tensor of the CPU, too: as source or target of a copy, or as places.
_MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_unsafe_index"}
# Arguments and results of operators of shardwise that stay on the host.
_ON_HOST = {"features", "bags", "slots", "steps", "lr", "sums", "weights", "offsets"}
_HOST_RESULTS = {"row_grads": (2,)}


class Pretended(Tensor):
    """A tensor whose `value` is on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "Pretended":
        self = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=GPU,
            requires_grad=value.requires_grad,
        )
        self.value = value.detach()
        return self

    def __repr__(self) -> str:
        return f"Pretended({self.value})"

    is_meta = False

    def tolist(self) -> Any:
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        namespace, name = func._schema.name.split("::")
        if namespace == "shardwise" and name not in library.GPU_VERSIONS:
            with _Factories():
                return _REFERENCES[name](*args, **kwargs)
        if name not in _MAY_MIX:
            _refuse_mixed(func, namespace, args, kwargs)
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        values = tree_map(_value, args)
        result = func(*values, **tree_map(_value, kwargs))
        if device is not None and torch.device(device).type != "meta":
            return result
        if func._schema.is_mutable and not name.endswith("_out"):
            return args[0] if name != "update_" else None
        on_host = _HOST_RESULTS.get(name, ())
        if isinstance(result, tuple | list):
            made = [r if i in on_host else _pretend(r) for i, r in enumerate(result)]
            return type(result)(made) if type(result) in (list, tuple) else tuple(made)
        return _pretend(result)


def _value(one: Any) -> Any:
    return one.value if isinstance(one, Pretended) else one


def _pretend(one: Any) -> Any:
    is_plain = isinstance(one, Tensor) and not isinstance(one, Pretended)
    return Pretended(one) if is_plain else one


def _refuse_mixed(func: Any, namespace: str, args: Any, kwargs: Any) -> None:
    names = [argument.name for argument in func._schema.arguments]
    for name, argument in [*zip(names, args, strict=False), *kwargs.items()]:
        if namespace == "shardwise" and name in _ON_HOST:
            continue
        each = argument if isinstance(argument, list | tuple) else [argument]
        for one in each:
            is_plain = isinstance(one, Tensor) and not isinstance(one, Pretended)
            if is_plain and one.dim() > 0 and one.numel() > 0:
                raise RuntimeError(
                    f"{func}: {name} {tuple(one.shape)} is on the CPU, another tensor on the GPU"
                )


class _Factories(TorchFunctionMode):
    """Gives pretended tensors where a function is asked for one on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.where:  # makes tensors of numbers itself, on the device that has no values
            args = tuple(torch.tensor(one) if isinstance(one, int | float) else one for one in args)
        has_gpu = any(isinstance(one, Pretended) for one in args)
        wanted = [*args[1:], *kwargs.values()] if not has_gpu else []
        if any(_is_gpu(one) for one in wanted):
            args = tuple(torch.device("cpu") if _is_gpu(one) else one for one in args)
            kwargs = {k: torch.device("cpu") if _is_gpu(v) else v for k, v in kwargs.items()}
            return tree_map(_pretend, func(*args, **kwargs))
        return func(*args, **kwargs)


def _is_gpu(one: Any) -> bool:
    return (isinstance(one, torch.device) and one.type == "meta") or (
        isinstance(one, str) and one == "meta"
    )


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Give a device on which tensors can be made, and to which they can be moved."""
    with _Factories():
        yield GPU
