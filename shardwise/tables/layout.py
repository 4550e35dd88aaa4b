"""How the ids of a collection reach its rows: in this process here, over ranks in `sharding`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from shardwise.ops.lookup import Ids, Update, Way, is_watched, lookup, plan_backward, restrict

Explain = Callable[[RuntimeError], Exception]
"""From a fault found in a call to an error that names feature, sample, id and table."""


@runtime_checkable
class Layout(Protocol):
    """Where the parts of a collection's tables lie, and what runs its lookups."""

    def look_up(
        self,
        call: Ids,
        shape: tuple[int, int],
        tables: Sequence[Tensor],
        way: Way,
        explain: Explain,
    ) -> Tensor:
        """Look up whole tables of which `tables` are the parts held here."""

    def plan_backward(self, updates: Sequence[Update], *, is_sparse: bool) -> Way:
        """Choose the way of backward of each part; `features` of the updates are filled in."""

    def at_step(self, update: Update) -> Update:
        """Give an update as it runs at the optimizer's step."""

    def whole(self, table: int, local: Sequence[Tensor]) -> Tensor:
        """Give a value per table, row or element of a whole table, from those of its parts here."""

    def agree(self, number: int) -> int:
        """Take the number of the first process, at most 62 bits."""

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error found before the lookup, on every process."""


class OneProcess:
    """The layout of whole tables in one process.

    Args:
        features: The features of the lookup, see `ops.lookup.reference`.
        num_tables: Tables of the lookup.
    """

    def __init__(self, features: Int[Tensor, "F 4"], num_tables: int) -> None:
        """Keep what the features read."""
        self._features = features
        self._num_tables = num_tables

    def look_up(
        self,
        call: Ids,
        shape: tuple[int, int],
        tables: Sequence[Tensor],
        way: Way,
        explain: Explain,
    ) -> Tensor:
        """Look up the tables."""
        if torch.compiler.is_compiling():
            if any(is_watched(table) for table in tables):
                raise RuntimeError(
                    "tables whose changes are tracked cannot be compiled, as compiled updates tell "
                    "nobody; leave the collection out of torch.compile, or track no changes"
                )
            return lookup(tables, call, shape, way=way)
        try:
            return lookup(tables, call, shape, way=way)
        except RuntimeError as error:
            raise explain(error) from None

    def plan_backward(self, updates: Sequence[Update], *, is_sparse: bool) -> Way:
        """Choose each table's way of backward."""
        own = [replace(u, features=restrict(self._features, u.tables)) for u in updates]
        return plan_backward(self._features, self._num_tables, own, is_sparse=is_sparse)

    def at_step(self, update: Update) -> Update:
        """Give the update as it is."""
        return update

    def whole(self, table: int, local: Sequence[Tensor]) -> Tensor:
        """Give the one value there is."""
        (value,) = local
        return value

    def agree(self, number: int) -> int:
        """Give the number."""
        return number

    def refuse(self, error: Exception) -> NoReturn:
        """Raise the error."""
        raise error
