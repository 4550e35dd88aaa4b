"""What an optimizer must know of slices: whose they are, and which parameters they replaced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


@runtime_checkable
class Ranks(Protocol):
    """The ranks that hold the slices."""

    def all_reduce(self, tensor: Tensor, *, op: Literal["sum", "max"], tag: str) -> Tensor:
        """Give the sum or the maximum over the ranks, in place or not."""


@runtime_checkable
class WholeRows(Protocol):
    """Knows where the further columns of slices lie."""

    def mean(self, sums: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Give means over whole rows [N] from sums over the columns of slices, by their number.

        Every rank calls it, whatever slices it has; those that have columns of the same rows must
        have sums of the same ones.
        """


@dataclass(frozen=True)
class SliceOwner:
    """Who holds a table.

    Attributes:
        ranks: The ranks that hold its slices, or could.
        is_counted: Whether this rank speaks for the slice: of its replicas, one does.
        number: The slice's, among those of its collection here.
        rows: What completes row sums; None if the rows of all tables of the collection are whole.
        parts: All slices of the table that lie here, the first one first.
        whole: Makes a value of the whole table from one of each part; the last argument says
            whether it has, for each row, something other than an element per column.
    """

    ranks: Ranks
    is_counted: bool
    number: int = 0
    rows: WholeRows | None = None
    parts: Sequence[Tensor] = ()
    whole: Callable[[Sequence[Tensor], bool], Tensor] | None = None


def own(param: torch.nn.Parameter, owner: SliceOwner) -> None:
    """Note on a parameter that it is a slice."""
    vars(param)["slice_owner"] = owner


def owner_of(param: Shaped[Tensor, "..."]) -> SliceOwner | None:
    """Give the owner of a slice; None for a parameter that lies here as a whole."""
    return getattr(param, "slice_owner", None)


def retire(param: torch.nn.Parameter, reason: str) -> None:
    """Note that a parameter was replaced: an optimizer that still holds it raises at its step.

    It would else train nothing, without a word.

    Args:
        param: No longer part of a module.
        reason: What it was and what replaced it, for the message.
    """
    vars(param)["retired"] = reason
    _watch_steps()


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_retired)


def _refuse_retired(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if (reason := getattr(param, "retired", None)) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds {reason}; make the optimizer afterwards, "
                    "from the module's parameters as they are then"
                )
