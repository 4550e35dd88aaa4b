"""Another plan for tables that are sharded already, while a job runs.

Only what a rank does not hold yet travels: where a block of the new plan overlaps one of the old,
its new holders get the overlap, each from one of the old holders, unless they have it themselves.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shardwise.optim.slices import retire
from shardwise.sharding.agreement import check_equal_plans
from shardwise.sharding.exchange import Exchange
from shardwise.sharding.many_ranks import ManyRanks
from shardwise.sharding.placement import Placement
from shardwise.sharding.plan import ShardingPlan, place_tables, table_configs
from shardwise.sharding.shard import CollectionPlan, own_slices, planned_collections
from shardwise.sharding.sliced import Block, SlicedTensor, blocks_of
from shardwise.sharding.wire import Wire
from shardwise.tables import EmbeddingBagCollection
from shardwise.tables.collection import TableCollection
from shardwise.tables.store import Store, allocate


@dataclass(frozen=True)
class ReshardReport:
    """What moving tables costs, or did.

    Attributes:
        tables: Bytes that travel between ranks for each table that moves, by its path.
        sent: Bytes that each rank sends.
        received: Bytes that each rank receives.
        peak: Bytes that this rank needs for a while beside its slices, at most.
        seconds: How long it took; 0 before.
    """

    tables: dict[str, int]
    sent: list[int]
    received: list[int]
    peak: int
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Bytes that travel."""
        return sum(self.sent)

    def __str__(self) -> str:
        """List the tables that move, and the ranks that have most to do."""
        lines = [f"{name}: {size / 1e6:.3f} MB" for name, size in self.tables.items()]
        took = f" in {self.seconds:.2f} s" if self.seconds else ""
        lines.append(
            f"{len(self.tables)} tables move, {self.total / 1e6:.3f} MB between ranks{took}; a "
            f"rank sends up to {max(self.sent) / 1e6:.3f} MB and receives up to "
            f"{max(self.received) / 1e6:.3f} MB; this one needs {self.peak / 1e6:.3f} MB more for "
            f"a while"
        )
        return "\n".join(lines)


class _Move(NamedTuple):
    """A collection whose tables get another layout."""

    path: str
    collection: TableCollection
    old: ManyRanks
    placements: list[Placement]

    @property
    def tables(self) -> list[int]:
        """The tables that move; of the others at most the way of the answers changes."""
        pairs = enumerate(zip(self.old.placements, self.placements, strict=True))
        return [t for t, (old, new) in pairs if _geometry(old) != _geometry(new)]


def reshard_cost(module: nn.Module, plan: ShardingPlan | CollectionPlan) -> ReshardReport:
    """Say what `reshard` would cost; nothing moves, and no rank needs another.

    Args:
        module: As for `reshard`.
        plan: As for `reshard`.

    Raises:
        ValueError: The plan does not fit the tables, or the collections are not sharded.
    """
    return _cost(_planned_moves(module, plan))


@torch.no_grad()
def reshard(module: nn.Module, plan: ShardingPlan | CollectionPlan) -> ReshardReport:
    """Put sharded tables where another plan says, with what their rules keep.

    Every rank calls it, between two steps. Tables move one after another, each giving its memory
    free before the next one. A table that lies where it did before keeps its parameters; those of
    the others are new, and an optimizer of PyTorch that holds old ones raises at its next step (the
    rules of `in_backward`, in backward and at the step, go along).

    Args:
        module: A model with sharded collections, or one such collection.
        plan: As for `shard`; collections that it does not name stay as they are.

    Returns:
        What it cost.

    Raises:
        ValueError: The plan does not fit the tables or differs between ranks, a collection is not
            sharded, or a table that moves has a gradient; nothing has moved.
    """
    start = time.monotonic()
    wire = _wire_of(module)
    with wire.together("reshard"):
        moves = _planned_moves(module, plan)
        for move in moves:
            _check_gradients(move)
        cost = _cost(moves)
    check_equal_plans({move.path: move.placements for move in moves}, wire)
    for move in moves:
        _rearrange(move)
    return ReshardReport(cost.tables, cost.sent, cost.received, cost.peak, time.monotonic() - start)


def _wire_of(module: nn.Module) -> Wire:
    for part in module.modules():
        if isinstance(part, TableCollection) and isinstance(part.layout, ManyRanks):
            return part.layout.wire
    raise ValueError(f"{type(module).__name__} has no sharded collection; call `shard` first")


def _planned_moves(module: nn.Module, plan: ShardingPlan | CollectionPlan) -> list[_Move]:
    moves = []
    for _, path, collection, own_plan in planned_collections(module, plan, are_sharded=True):
        layout = collection.layout
        assert isinstance(layout, ManyRanks), "planned_collections has checked it"
        placements = place_tables(
            table_configs(collection),
            own_plan,
            world_size=layout.wire.world_size,
            is_pooled=isinstance(collection, EmbeddingBagCollection),
        )
        moves.append(_Move(path, collection, layout, placements))
    return moves


def _check_gradients(move: _Move) -> None:
    for store in move.collection.stores:
        if store.key in move.tables and store.weight.grad is not None:
            raise ValueError(
                f"table {store.config.name!r} has a gradient, which would be lost; call the "
                "optimizer's step and zero_grad before resharding"
            )


def _rearrange(move: _Move) -> None:
    """Move the tables of a collection, then let it look them up by their new layout."""
    collection, old = move.collection, move.old
    exchange = Exchange(
        collection.features, move.placements, old.wire, path=move.path, codecs=old.exchange.codecs
    )
    new = ManyRanks(exchange, move.placements, old.wire)
    before, by_table = collection.stores, dict[int, list[Store]]()
    for store in before:
        by_table.setdefault(store.key, []).append(store)
    with old.wire.together("moving tables"):
        for table in move.tables:
            by_table[table] = _move_table(by_table[table], old, new)
    by_part = {(store.key, store.part): store for stores in by_table.values() for store in stores}
    stores = [by_part[cell.table, cell.part] for cell in exchange.cells]
    collection.move(stores, new)
    own_slices(stores, new)
    for store in before:
        if store.key in move.tables:
            text = f"table {store.config.name!r} as it was before `reshard` moved it"
            retire(store.weight, text)


def _move_table(before: Sequence[Store], old: ManyRanks, new: ManyRanks) -> list[Store]:
    """Give the slices of a table as they are to lie; those before give their memory free."""
    first = before[0]
    cells = [cell for cell in new.exchange.cells if cell.table == first.key]
    stores = [Store(first.config, first.key, first.weight.device, cell.part) for cell in cells]
    for kind in (None, *first.states):
        values = [one.weight.data if kind is None else one.states[kind] for one in before]
        is_per_row = kind is not None and values[0].dim() == 1
        if kind is not None:
            for store in stores:
                size = store.weight.shape[:1] if is_per_row else store.weight.shape
                store.states[kind] = allocate(size, values[0].dtype, values[0].device)
        fresh = [one.weight.data if kind is None else one.states[kind] for one in stores]
        redistribute(
            old.whole(first.key, values, is_per_row), new.whole(first.key, fresh, is_per_row)
        )
    for store in before:
        for value in (store.weight, *store.states.values()):
            value.data = value.data.new_empty(0, *value.shape[1:])
    return stores


# ---- what goes where


class _Overlap(NamedTuple):
    """What a block of the new layout and one of the old have in common.

    Attributes:
        new: The number of the one.
        old: The number of the other.
        offsets: First element.
        sizes: Elements.
    """

    new: int
    old: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.sizes)


def redistribute(old: SlicedTensor, new: SlicedTensor) -> None:
    """Fill a value from one that lies otherwise; every rank must call this.

    Args:
        old: The value.
        new: Where it is to lie: of the same shape and dtype, on the same ranks.
    """
    wire, old_blocks, new_blocks = new.wire, old.blocks(), new.blocks()
    held = {one.offsets: one.value for one in old.local}

    def read(overlap: _Overlap) -> Tensor:
        block = old_blocks[overlap.old]
        return _within(held[block.offsets], block, overlap)

    def write(overlap: _Overlap, value: Tensor) -> None:
        block = new_blocks[overlap.new]
        for one in new.local:  # values per row lie here once for each block of columns
            if one.offsets == block.offsets and one.value.shape == block.sizes:
                _within(one.value, block, overlap).copy_(value.view(overlap.sizes))

    sends: list[list[_Overlap]] = [[] for _ in range(wire.world_size)]
    receives: list[list[_Overlap]] = [[] for _ in range(wire.world_size)]
    for sender, receiver, overlap in _journeys(old_blocks, new_blocks):
        if sender == receiver == wire.rank:
            write(overlap, read(overlap))
        elif sender == wire.rank:
            sends[receiver].append(overlap)
        elif receiver == wire.rank:
            receives[sender].append(overlap)
    empty = old.local[0].value.new_empty(0)
    parts = [read(overlap).reshape(-1) for overlaps in sends for overlap in overlaps]
    received = wire.all_to_all(
        torch.cat([empty, *parts]).view(torch.uint8),
        *(
            [empty.element_size() * sum(one.numel for one in row) for row in each]
            for each in (sends, receives)
        ),
        tag=f"moving table {new.placement.table!r}",
        lane="answers",
    ).wait()
    overlaps = [overlap for row in receives for overlap in row]
    pieces = received.view(empty.dtype).split([overlap.numel for overlap in overlaps])
    for overlap, piece in zip(overlaps, pieces, strict=True):
        write(overlap, piece)


def _journeys(old: Sequence[Block], new: Sequence[Block]) -> Iterator[tuple[int, int, _Overlap]]:
    """Give, for each holder of a new block, who has what of it, in one order on all ranks.

    A rank takes from itself what it has; else the old holders take turns.
    """
    low = np.array([block.offsets for block in old])
    high = low + [block.sizes for block in old]
    for i, block in enumerate(new):
        first = np.maximum(low, block.offsets)
        sizes = np.minimum(high, np.add(block.offsets, block.sizes)) - first
        for j in np.flatnonzero((sizes > 0).all(1)).tolist():
            overlap = _Overlap(i, j, tuple(first[j].tolist()), tuple(sizes[j].tolist()))
            holders = old[j].ranks
            for rank in block.ranks:
                yield rank if rank in holders else holders[rank % len(holders)], rank, overlap


def _within(value: Tensor, block: Block, overlap: _Overlap) -> Tensor:
    """View an overlap of a block's value."""
    for dim, (start, size) in enumerate(zip(overlap.offsets, overlap.sizes, strict=True)):
        value = value.narrow(dim, start - block.offsets[dim], size)
    return value


# ---- what it costs


def _cost(moves: Sequence[_Move]) -> ReshardReport:
    world_size = moves[0].old.wire.world_size
    sent, received, peak = [0] * world_size, [0] * world_size, 0
    tables: dict[str, int] = {}
    for move in moves:
        for table in move.tables:
            held = [one for one in move.collection.stores if one.key == table]
            name = f"{move.path}.{held[0].config.name}".lstrip(".")
            tables[name] = own = 0
            for value in (held[0].weight, *held[0].states.values()):
                old, new = (
                    blocks_of(placement, is_per_row=value.dim() == 1)
                    for placement in (move.old.placements[table], move.placements[table])
                )
                for sender, receiver, overlap in _journeys(old, new):
                    size = overlap.numel * value.element_size()
                    own += size if receiver == move.old.wire.rank else 0
                    if sender != receiver:
                        tables[name] += size
                        sent[sender] += size
                        received[receiver] += size
            peak = max(peak, 2 * own + sum(one.weight.nbytes for one in held))
    return ReshardReport(tables, sent, received, peak)


def _geometry(placement: Placement) -> tuple[object, ...]:
    return placement.row_cuts, placement.column_cuts, placement.cells
