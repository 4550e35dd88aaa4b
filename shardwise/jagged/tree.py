"""The jagged and keyed tensors as pytree nodes, so that compile, export and tree maps pass them.

Lengths are a leaf and offsets are not: [F·B + 1] as an input of an exported program makes
AOTInductor compute B from it in floating point, and return wrong rows for most B. So the offsets
leaf is None, and offsets given alone become lengths.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from shardwise.jagged.bags import Bags
from shardwise.jagged.jagged_tensor import JaggedTensor
from shardwise.jagged.keyed_jagged_tensor import KeyedJaggedTensor
from shardwise.jagged.keyed_tensor import KeyedTensor

_JAGGED = ("values", "weights", "lengths", "offsets")
_KEYED_JAGGED = (*_JAGGED, "stride_per_key_per_rank", "inverse_indices")
_KEYED = ("values",)
NUM_KEYED_JAGGED_LEAVES = len(_KEYED_JAGGED)

_Kind = TypeVar("_Kind")
_KeyedJaggedContext = tuple[tuple[str, ...], tuple[str, ...] | None]
_KeyedContext = tuple[tuple[str, ...], tuple[int, ...], int]


def _lengths(bags: Bags) -> Any:
    """Give the lengths, which only leaves of a tree map may lack together with the offsets."""
    return bags.lengths() if bags._lengths is None and bags._offsets is not None else bags._lengths


def flatten_jagged(jagged: JaggedTensor) -> tuple[list[Any], None]:
    """Give values, weights, lengths and no offsets."""
    return [jagged._values, jagged._weights, _lengths(jagged), None], None


def unflatten_jagged(leaves: Iterable[Any], context: None) -> JaggedTensor:
    """Undo `flatten_jagged`; leaves may be anything a tree map gave."""
    values, weights, lengths, offsets = leaves
    if isinstance(values, Tensor) and isinstance(lengths, Tensor):
        return JaggedTensor(values, weights, lengths, offsets)
    return _hold(JaggedTensor, values=values, weights=weights, lengths=lengths, offsets=offsets)


def flatten_keyed_jagged(
    kjt: KeyedJaggedTensor,
) -> tuple[list[Any], _KeyedJaggedContext]:
    """Give values, weights, lengths, no offsets, strides and inverse indices; context the keys."""
    inverse = kjt._inverse_indices
    strides = kjt._stride_per_key_per_rank
    if isinstance(strides, list):
        strides = torch.tensor(strides, dtype=torch.int64).reshape(len(strides), -1)
    leaves = [kjt._values, kjt._weights, _lengths(kjt), None, strides]
    return (
        [*leaves, None if inverse is None else inverse[1]],
        (tuple(kjt._keys), None if inverse is None else tuple(inverse[0])),
    )


def unflatten_keyed_jagged(
    leaves: Iterable[Any], context: _KeyedJaggedContext
) -> KeyedJaggedTensor:
    """Undo `flatten_keyed_jagged`; leaves may be anything a tree map gave."""
    values, weights, lengths, offsets, strides, indices = leaves
    keys, inverse_keys = context
    fields = {
        "keys": list(keys),
        "values": values,
        "weights": weights,
        "lengths": lengths,
        "offsets": offsets,
        "stride_per_key_per_rank": strides,
        "inverse_indices": None if inverse_keys is None else (list(inverse_keys), indices),
    }
    if isinstance(values, Tensor) and isinstance(lengths, Tensor):
        return KeyedJaggedTensor(**fields)
    return _hold(KeyedJaggedTensor, **fields)


def flatten_keyed(keyed: KeyedTensor) -> tuple[list[Any], _KeyedContext]:
    """Give the values; context: keys, widths and the dimension they lie along."""
    context = (tuple(keyed._keys), tuple(keyed._length_per_key), keyed._key_dim)
    return [keyed._values], context


def unflatten_keyed(leaves: Iterable[Any], context: _KeyedContext) -> KeyedTensor:
    """Undo `flatten_keyed`; leaves may be anything a tree map gave."""
    (values,) = leaves
    keys, widths, dim = context
    if isinstance(values, Tensor):
        return KeyedTensor(list(keys), list(widths), values, dim)
    return _hold(
        KeyedTensor, keys=list(keys), length_per_key=list(widths), values=values, key_dim=dim
    )


def _hold(cls: type[_Kind], **fields: object) -> _Kind:
    """Make a tensor of leaves that are no tensors, as tree maps give; only good to flatten."""
    result = object.__new__(cls)
    for owner in cls.__mro__:
        for slot in getattr(owner, "__slots__", ()):
            setattr(result, slot, fields.get(slot.removeprefix("_")))
    return result


def _freeze(context: Any) -> Any:
    """Give a context as it was before JSON made its tuples lists."""
    return tuple(_freeze(item) for item in context) if isinstance(context, list) else context


def _register(
    cls: type[Any],
    names: tuple[str, ...],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Iterable[Any], Any], Any],
) -> None:
    # No `KeyEntry` in the signature: it is a protocol that cannot be checked at run time.
    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        leaves, context = flatten(value)
        entries: list[pytree.KeyEntry] = [pytree.GetAttrKey(name) for name in names]
        return list(zip(entries, leaves, strict=True)), context

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"shardwise.{cls.__name__}",
        to_dumpable_context=lambda context: context,
        from_dumpable_context=_freeze,
        flatten_with_keys_fn=flatten_with_keys,
    )
    fx_pytree.register_pytree_flatten_spec(cls, lambda value, spec: flatten(value)[0])
    # An exported program keeps its example inputs; loading it must be able to read them.
    torch.serialization.add_safe_globals([cls])


_register(JaggedTensor, _JAGGED, flatten_jagged, unflatten_jagged)
_register(KeyedJaggedTensor, _KEYED_JAGGED, flatten_keyed_jagged, unflatten_keyed_jagged)
_register(KeyedTensor, _KEYED, flatten_keyed, unflatten_keyed)
