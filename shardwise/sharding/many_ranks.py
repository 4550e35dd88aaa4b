"""The layout of a collection whose tables lie in slices on many ranks, and its state dict."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardwise.ops.lookup import Ids, Update, Way
from shardwise.sharding.exchange import Exchange
from shardwise.sharding.placement import Placement
from shardwise.sharding.sliced import Local, SlicedTensor
from shardwise.sharding.wire import Wire
from shardwise.tables.collection import TableCollection
from shardwise.tables.layout import Explain
from shardwise.tables.store import Store


class ManyRanks:
    """Looks up tables whose slices lie on many ranks.

    Args:
        exchange: Carries ids to slices and vectors back.
        placements: Where each table lies.
        wire: Connects the ranks.
    """

    def __init__(self, exchange: Exchange, placements: Sequence[Placement], wire: Wire) -> None:
        """Keep what the ranks share."""
        self.exchange = exchange
        self.placements = list(placements)
        self.wire = wire

    def look_up(
        self,
        call: Ids,
        shape: tuple[int, int],
        tables: Sequence[Tensor],
        way: Way,
        explain: Explain,
    ) -> Tensor:
        """Exchange ids for vectors with all ranks."""
        return self.exchange(call, shape, tables, way, explain)

    def plan_backward(self, updates: Sequence[Update], *, is_sparse: bool) -> Way:
        """Choose the way of backward of each slice."""
        return self.exchange.plan_backward(updates, is_sparse=is_sparse)

    def at_step(self, update: Update) -> Update:
        """Give an update that adds up over ranks what it needs before it runs."""
        return self.exchange.at_step(update)

    def whole(self, table: int, local: Sequence[Tensor], is_per_row: bool = False) -> SlicedTensor:
        """Give a value per row or element of the slices here as one of the whole table."""
        parts = [cell.part for cell in self.exchange.cells if cell.table == table]
        blocks = []
        for part, value in zip(parts, local, strict=True):
            column = 0 if is_per_row else part.first_column
            offsets = (part.first_row, column, *(0 for _ in value.shape[2:]))
            blocks.append(Local(offsets[: value.dim()], value))
        return SlicedTensor(self.placements[table], blocks, self.wire, is_per_row)

    def agree(self, number: int) -> int:
        """Take the number of rank 0."""
        return int(self.wire.broadcast(torch.tensor(number), source=0, tag="seed"))

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error of this rank on all."""
        self.exchange.refuse(error)


def keep_whole_state(collection: TableCollection) -> None:
    """Let the state dict of a sharded collection have the keys and shapes of the plain one."""
    module: Any = collection  # torch does not annotate these
    module.register_state_dict_post_hook(_give_whole)
    module.register_load_state_dict_pre_hook(_cut_loaded)


def _give_whole(
    collection: TableCollection, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Put whole tables in the place of slices."""
    for key, parts in _tables(collection, prefix):
        for name, _ in parts[1:]:
            del state_dict[name]
        local = [store.weight.detach() for _, store in parts]
        state_dict[parts[0][0]] = collection.layout.whole(key, local)


def _cut_loaded(
    collection: TableCollection, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Put this rank's slices in the place of whole tables, which are `SlicedTensor`s or full."""
    errors: list[str] = rest[-1]
    layout = collection.layout
    assert isinstance(layout, ManyRanks), "the hook is of sharded collections"
    for key, parts in _tables(collection, prefix):
        name = parts[0][0]
        if name not in state_dict:
            continue
        given = state_dict.pop(name)
        local = [store.weight.detach() for _, store in parts]
        whole = layout.whole(key, local)
        if given.shape != whole.shape:
            errors.append(
                f"size mismatch for {name}: it is {list(given.shape)} in the state dict, "
                f"{list(whole.shape)} in the model"
            )
            given = whole
        elif isinstance(given, SlicedTensor):
            given = given if given.placement == whole.placement else given.full()
        for i, (part_name, store) in enumerate(parts):
            is_sliced = isinstance(given, SlicedTensor)
            state_dict[part_name] = given.local[i].value if is_sliced else store.cut(given)


def _tables(
    collection: TableCollection, prefix: str
) -> Iterator[tuple[int, list[tuple[str, Store]]]]:
    """Give the parts of each table here with their names in a state dict."""
    names = [prefix + name for name in collection.table_parameters()]
    stores = sorted(collection.stores, key=lambda store: store.key)
    for key, parts in groupby(zip(names, stores, strict=True), key=lambda part: part[1].key):
        yield key, list(parts)
