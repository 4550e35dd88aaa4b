"""What an optimizer must know of a parameter that is a slice of a table on many ranks."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor


@runtime_checkable
class Ranks(Protocol):
    """The ranks that hold the slices."""

    def all_reduce(self, tensor: Tensor, *, op: Literal["sum", "max"], tag: str) -> Tensor:
        """Give the sum or the maximum over the ranks, in place or not."""


@dataclass(frozen=True)
class SliceOwner:
    """Who holds a table.

    Attributes:
        ranks: The ranks that hold its slices, or could.
        is_counted: Whether this rank speaks for the slice: of its replicas, one does.
    """

    ranks: Ranks
    is_counted: bool


def own(param: torch.nn.Parameter, owner: SliceOwner) -> None:
    """Note on a parameter that it is a slice."""
    vars(param)["slice_owner"] = owner


def owner_of(param: Shaped[Tensor, "..."]) -> SliceOwner | None:
    """Give the owner of a slice; None for a parameter that lies here as a whole."""
    return getattr(param, "slice_owner", None)
