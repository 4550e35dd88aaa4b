"""The tensors of a state, and the ranks that hold them."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.sharding.model_parallel import get_unwrapped_module
from shardwise.sharding.sliced import SlicedTensor
from shardwise.sharding.wire import Wire


def tensors_of(model_or_state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the state by name, of a model without `DistributedModelParallel` and DDP.

    Raises:
        TypeError: Something in it is no tensor.
    """
    if isinstance(model_or_state, nn.Module):
        model_or_state = get_unwrapped_module(model_or_state).state_dict()
    for name, value in model_or_state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state {name!r}: a file of tensors cannot hold a {type(value).__name__}; leave it "
                "out of the state given"
            )
    return dict(model_or_state)


def wire_of(state: Mapping[str, Tensor]) -> Wire | None:
    """Connect the ranks among which a state is sharded; None if all of it lies here."""
    is_sharded = any(
        isinstance(value, SlicedTensor) or hasattr(value, "device_mesh") for value in state.values()
    )
    if not is_sharded or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Wire(dist.group.WORLD, name="state of a model")


def together(wire: Wire | None, what: str) -> AbstractContextManager[None]:
    """Let an error of one rank be raised on all."""
    return nullcontext() if wire is None else wire.together(what)


def some_of(names: Iterable[str]) -> str:
    """List the first of many names, for a message."""
    listed = sorted(names)
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return f"{listed[:6]}{more}"


def mark_changed(model: object, prefix: str = "") -> None:
    """Tell who tracks changes that any row may have changed, of tables whose names begin so."""
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if name.startswith(prefix) and hasattr(parameter, "delta_store"):
            parameter.delta_store.mark(None)
