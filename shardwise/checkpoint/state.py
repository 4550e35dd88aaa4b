"""The state of a run as JSON, and its tensors by name.

A state is a mapping of names to modules, optimizers, other objects with `state_dict`, tensors,
values of JSON, and mappings and sequences of these. Nested names are joined by dots.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.checkpoint.random_state import PerRank
from shardwise.optim import KeyedOptimizer
from shardwise.optim.slices import owner_of
from shardwise.sharding.model_parallel import get_unwrapped_module

_TENSOR, _TUPLE, _ITEMS, _RANKS = "$tensor", "$tuple", "$items", "$ranks"


class Named(dict[str, Tensor]):
    """The tensors of a state by name; they are the state's own, not copies.

    Args:
        rank: Of this process.

    Attributes:
        own: The names of those that are this rank's own.
    """

    def __init__(self, rank: int) -> None:
        """Start without any."""
        super().__init__()
        self.rank = rank
        self.own: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor."""
        if name in self:
            raise ValueError(f"checkpoint: two tensors have the name {name!r}; rename one")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"checkpoint: tensor {name!r} is not dense; save it as dense parts")
        self[name] = tensor.detach() if tensor.requires_grad else tensor


def encode(state: Any, tensors: Named, name: str = "") -> Any:
    """Turn a state into JSON, in which tensors are named.

    Args:
        state: What to save.
        tensors: The tensors are added here.
        name: Of the state, for its tensors and for messages.

    Raises:
        TypeError: A value cannot be saved; it is named.
        ValueError: Two tensors have one name, or an optimizer of slices does not name them.
    """
    if isinstance(state, Tensor):
        tensors.add(name, state)
        return {_TENSOR: name}
    if isinstance(state, PerRank):
        before = set(tensors)
        own = encode(state.value, tensors, _join(name, f"rank{tensors.rank}"))
        tensors.own |= tensors.keys() - before
        return {_RANKS: {str(tensors.rank): own}}
    if hasattr(state, "state_dict"):
        _check_logical(state, name)
        owner = get_unwrapped_module(state) if isinstance(state, nn.Module) else state
        return encode(owner.state_dict(), tensors, name)
    if isinstance(state, Mapping):
        items = {key: encode(one, tensors, _join(name, key)) for key, one in state.items()}
        if all(isinstance(key, str) and key[:1] != "$" for key in items):
            return items
        return {_ITEMS: [[encode(key, Named(0), name), one] for key, one in items.items()]}
    if isinstance(state, list | tuple):
        listed = [encode(one, tensors, _join(name, i)) for i, one in enumerate(state)]
        return {_TUPLE: listed} if isinstance(state, tuple) else listed
    if state is None or type(state) in (bool, int, float, str):
        return state
    raise TypeError(
        f"checkpoint: {name!r} is of type {type(state).__name__}; a state holds tensors, values of "
        "JSON and what has a state_dict()"
    )


def decode(saved: Any, read: Callable[[str], Tensor]) -> Any:
    """Make the state again of what `encode` gave, with tensors by their names."""
    if isinstance(saved, list):
        return [decode(one, read) for one in saved]
    if not isinstance(saved, dict):
        return saved
    if _TENSOR in saved:
        return read(saved[_TENSOR])
    if _TUPLE in saved:
        return tuple(decode(one, read) for one in saved[_TUPLE])
    if _ITEMS in saved:
        return {decode(key, read): decode(one, read) for key, one in saved[_ITEMS]}
    if _RANKS in saved:
        return {int(rank): decode(one, read) for rank, one in saved[_RANKS].items()}
    return {key: decode(one, read) for key, one in saved.items()}


def of_rank(saved: Any, rank: int) -> Any:
    """Give what a rank saved of what is each rank's own; None if it was not there."""
    return saved.get(_RANKS, {}).get(str(rank)) if isinstance(saved, dict) else None


def names_in(saved: Any) -> list[str]:
    """List the tensors in what `encode` gave."""
    if isinstance(saved, dict):
        return [saved[_TENSOR]] if _TENSOR in saved else names_in([*saved.values()])
    return [name for one in saved for name in names_in(one)] if isinstance(saved, list) else []


def merge(first: Any, other: Any) -> Any:
    """Join what two ranks have encoded; where both have a value, the first counts."""
    if not (isinstance(first, dict) and isinstance(other, dict)) or _TENSOR in first:
        return first
    both = {key: merge(one, other[key]) if key in other else one for key, one in first.items()}
    return {**other, **both} if other.keys() - first.keys() else both


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _check_logical(state: Any, name: str) -> None:
    """Refuse an optimizer whose state dict would hold slices without the name of their table."""
    if isinstance(state, torch.optim.Optimizer) and not isinstance(state, KeyedOptimizer):
        params = (param for group in state.param_groups for param in group["params"])
        if any(owner_of(param) is not None for param in params):
            raise ValueError(
                f"checkpoint: {name!r}, a {type(state).__name__}, has slices of tables and does "
                "not name them; make it KeyedOptimizerWrapper(dict(model.named_parameters()), ...)"
            )
