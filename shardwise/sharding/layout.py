"""Where everything lies in the messages of an exchange: tables of integers, fixed by the plan.

All ranks derive them from the plan alone, so nothing about the order of a message is ever sent.

Each rank that holds a slot (see `routes`) has a *channel* for it; a source sends a slot's ids
through one of them. A *piece* is what one channel answers to one stripe. Channels and pieces are
numbered rank after rank.

By *relay*, ids for several ranks of one host go there once, numbered through the rows that the host
holds, and a second hop among its ranks, which is laid out by the same code, takes them apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from shardwise.ops.lookup import Pooling
from shardwise.ops.route import PARTIALS, ROWS, Routes
from shardwise.sharding.placement import Placement
from shardwise.sharding.routes import Ints, Ranks, Route, Slots, Stripe
from shardwise.tables.store import Part

_NARROW = 2**31


@dataclass(frozen=True)
class Cell:
    """A slice that lies here.

    Attributes:
        table: The table's number.
        part: Which rows and columns; none of both where nothing of the table lies here.
        replicas: The ranks that hold it, ascending.
        block: Its row block and column block; None where nothing of the table lies here.
    """

    table: int
    part: Part
    replicas: tuple[int, ...]
    block: tuple[int, int] | None


class Kind(IntEnum):
    """How a slice is reached, and what its gradient needs; slices are stored in this order.

    So each lookup reads one run of them, and those with replicas, or those and the ones whose
    columns are cut, are a run as well.
    """

    RELAYED = 0
    RELAYED_CUT = 1
    RELAYED_REPLICA = 2
    EVERYWHERE = 3
    REPLICA = 4
    CUT = 5
    WHOLE = 6
    EMPTY = 7


@dataclass(frozen=True, kw_only=True, eq=False)
class HopLayout:
    """One exchange of ids for vectors among some ranks.

    Attributes:
        routes: What the operator `route` reads.
        is_wide: Whether ids travel as int64.
        modes: PARTIALS or ROWS, of each channel to this rank.
        piece_channels: Of each piece, the channel whose vectors it holds.
        piece_widths: Elements of a vector.
        first_piece: Of each rank, and the number of all.
        slot_pieces: Of each slot of each stripe, the piece that answers this rank.
        stripes: What the operator `combine` reads.
        owned: What this rank looks up for others: (channel, cell, pooling, width), in send order.
        relayed: What it looks up by a second hop: (channel, stripe), in send order.
        split_features: Of each split, the first feature that reads it, for messages.
        channel_tables: Of each channel, the first table that it serves.
        piece_tables: Of each piece, its table.
    """

    routes: Routes
    is_wide: bool
    modes: Tensor
    piece_channels: Tensor
    piece_widths: Tensor
    first_piece: Tensor
    slot_pieces: Tensor
    stripes: Tensor
    owned: list[tuple[int, int, int, int]]
    relayed: list[tuple[int, Stripe]]
    split_features: list[int]
    channel_tables: Ints
    piece_tables: Ints

    @property
    def num_channels(self) -> int:
        """Channels of all ranks."""
        return int(self.routes.first_channel[-1])


class Channels(NamedTuple):
    """The pairs of a slot and a rank that holds it, split after split; each is a channel."""

    slot: Ints  # counted through all splits
    holder: Ints
    is_chosen: NDArray[np.bool_]  # by this rank, to send to
    number: Ints
    by_number: Ints
    first: Ints  # number of the first channel of each rank, and of all


def _number_channels(every: Sequence[Slots], ranks: Ranks) -> Channels:
    holders = [cell for slots in every for cell in slots.holders]
    holder = np.fromiter(chain.from_iterable(holders), np.int64)
    slot = np.repeat(np.arange(len(holders)), np.fromiter(map(len, holders), np.int64))
    chosen = np.fromiter(chain.from_iterable(slots.chosen for slots in every), np.int64)
    by_number = np.lexsort((slot, holder))
    number = np.empty_like(by_number)
    number[by_number] = np.arange(len(by_number))
    first = np.searchsorted(holder[by_number], np.arange(ranks.world_size + 1))
    return Channels(slot, holder, holder == chosen[slot], number, by_number, first)


class Pieces(NamedTuple):
    """The pairs of a stripe and a channel, rank after rank, those of a second hop last."""

    stripe: Ints
    pair: Ints  # the channel's place in `Channels`
    first: Ints  # of each rank, and the number of all
    chosen: Ints  # those that this rank is sent, stripe after stripe


def _number_pieces(
    stripes: Sequence[Stripe], first_pair: Ints, split_of: Ints, channels: Channels, world_size: int
) -> Pieces:
    """Number the pieces; `first_pair` is that of each split in `channels`."""
    spans = [np.arange(first_pair[p], first_pair[p + 1]) for p in split_of.tolist()]
    pair = np.concatenate(spans)
    stripe = np.repeat(np.arange(len(stripes)), [len(span) for span in spans])
    by_relay = np.array([s.route.by_relay for s in stripes])
    holder = channels.holder[pair]
    order = np.lexsort((pair, stripe, by_relay[stripe], holder))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first = np.searchsorted(holder[order], np.arange(world_size + 1))
    return Pieces(stripe[order], pair[order], first, place[channels.is_chosen[pair]])


def lay_hop(
    stripes: Sequence[Stripe], ranks: Ranks, cells: Mapping[tuple[int, int, int], int]
) -> HopLayout:
    """Number channels and pieces of all ranks, and find what is this one's.

    Args:
        stripes: In the order of the output, all those of one feature together.
        ranks: Who takes part.
        cells: The number of each cell that lies here, by table, row block and column block.
    """
    numbers: dict[Route, int] = {}
    split_of = np.array([numbers.setdefault(s.route, len(numbers)) for s in stripes])
    every = [route.slots(ranks) for route in numbers]
    sizes = np.array([len(slots.holders) for slots in every])
    first_slot = _starts(sizes)
    channels = _number_channels(every, ranks)
    first_pair = np.searchsorted(channels.slot, first_slot)
    pieces = _number_pieces(stripes, first_pair, split_of, channels, ranks.world_size)

    own_channels, own_pieces = (slice(*one.first[ranks.rank :][:2]) for one in (channels, pieces))
    owned: list[tuple[int, int, int, int]] = []
    relayed: list[tuple[int, Stripe]] = []
    for s, k in zip(pieces.stripe[own_pieces], pieces.pair[own_pieces], strict=True):
        one, channel = stripes[s], int(channels.number[k] - channels.first[ranks.rank])
        if one.route.by_relay:
            relayed.append((channel, one))
            continue
        row_block = one.row_blocks[int(channels.slot[k] - first_slot[split_of[s]])]
        pooling = Pooling.SUM if one.route.mode == PARTIALS else Pooling.NONE
        cell = cells[one.table, row_block, one.column_block]
        owned.append((channel, cell, int(pooling), one.columns[1]))

    split_of_slot = np.repeat(np.arange(len(every)), sizes)
    split_of_channel = split_of_slot[channels.slot[channels.by_number]]
    modes = np.array([route.mode for route in numbers])
    widths, tables = np.array([(s.columns[1], s.table) for s in stripes]).T
    readers = np.unique(split_of, return_index=True)[1]
    return HopLayout(
        routes=Routes(
            *_splits_and_blocks(numbers, every, first_slot),
            channels=_tensor(channels.number[channels.is_chosen]),
            first_channel=_tensor(channels.first),
        ),
        is_wide=any(slots.num_rows > _NARROW for slots in every),
        modes=_tensor(modes[split_of_channel[own_channels]]),
        piece_channels=_tensor(channels.number[pieces.pair]),
        piece_widths=_tensor(widths[pieces.stripe]),
        first_piece=_tensor(pieces.first),
        slot_pieces=_tensor(pieces.chosen),
        stripes=_stripe_numbers(stripes, split_of, _starts(sizes[split_of])),
        owned=owned,
        relayed=relayed,
        split_features=[stripes[reader].feature for reader in readers],
        channel_tables=tables[readers][split_of_channel],
        piece_tables=tables[pieces.stripe],
    )


def _starts(sizes: Ints) -> Ints:
    """Give where runs of some sizes start, and where the last one ends."""
    return np.append(0, np.cumsum(sizes, dtype=np.int64))


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def _splits_and_blocks(
    routes: Mapping[Route, int], every: Sequence[Slots], first_slot: Ints
) -> tuple[Tensor, Tensor]:
    first_block = _starts(np.array([len(slots.blocks) for slots in every]))
    splits = [
        (route.input, route.mode, block, next_block - block, slot, next_slot - slot)
        for route, (block, next_block), (slot, next_slot) in zip(
            routes, pairwise(first_block.tolist()), pairwise(first_slot.tolist()), strict=True
        )
    ]
    return _tensor(splits), _tensor(np.concatenate([slots.blocks for slots in every]))


def _stripe_numbers(stripes: Sequence[Stripe], split_of: Ints, first_base: Ints) -> Tensor:
    return _tensor(
        [
            (split, s.pooling, s.feature, *s.columns[:2], base, s.columns[2])
            for s, split, base in zip(
                stripes, split_of.tolist(), first_base[:-1].tolist(), strict=True
            )
        ]
    )


# ---- a whole exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A run of the cells here that one lookup reads.

    Attributes:
        first: Number of its first cell.
        last: Number after that of its last one.
        features: What is looked up (input, cell within the region, pooling, width).
    """

    first: int
    last: int
    features: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where one collection's tables lie, and how their ids and vectors travel.

    Attributes:
        cells: What lies here.
        kinds: Of each cell.
        everywhere: The tables of which every rank has all; nothing of them travels.
        owned: The cells that the first hop reads.
        relayed: The cells that the second hop reads.
        hop: The exchange among all ranks; None where nothing travels.
        relay: The second hop, among the ranks of this host; None where no plan needs one here.
        has_relay: Whether any host has a second hop.
        is_everywhere: Of each feature, whether its table is everywhere.
    """

    cells: list[Cell]
    kinds: list[Kind]
    everywhere: Region
    owned: Region
    relayed: Region
    hop: HopLayout | None
    relay: HopLayout | None
    has_relay: bool
    is_everywhere: list[bool]


def lay_out(features: Int[Tensor, "F 4"], placements: Sequence[Placement], ranks: Ranks) -> Layout:
    """Lay an exchange out.

    Args:
        features: Of the plain lookup: (input, table, pooling, width).
        placements: Where each table lies.
        ranks: All ranks, seen from this one.
    """
    rows = features.tolist()
    is_sequence = {table: pooling == Pooling.NONE for _, table, pooling, _ in rows}
    modes = [
        ROWS if is_sequence.get(table, False) or placement.answer == "rows" else PARTIALS
        for table, placement in enumerate(placements)
    ]
    whole = [_is_everywhere(placement, ranks) for placement in placements]
    relays = [
        mode == PARTIALS and placement.relay and _gains_by_relay(placement, ranks)
        for mode, placement in zip(modes, placements, strict=True)
    ]
    cells, kinds = _list_cells(placements, whole, relays, ranks.rank)
    numbers = {(c.table, *c.block): number for number, c in enumerate(cells) if c.block}
    stripes: list[Stripe] = []
    for key, table, pooling, _ in rows:
        if not whole[table]:
            feature = stripes[-1].feature + 1 if stripes else 0
            route = (key, modes[table], relays[table])
            stripes += _cut(placements[table], table, route, feature, pooling)
    hop = lay_hop(stripes, ranks, numbers) if stripes else None
    second = _second_stripes(hop.relayed, ranks) if hop else []
    neighbours = Ranks(ranks.number_on_host, (tuple(range(len(ranks.hosts[ranks.host]))),))
    relay = lay_hop(second, neighbours, numbers) if second else None
    local = [(key, numbers[t, 0, 0], pooling, d) for key, t, pooling, d in rows if whole[t]]
    return Layout(
        cells=cells,
        kinds=kinds,
        everywhere=_region(local, kinds, {Kind.EVERYWHERE}),
        owned=_region(hop.owned if hop else [], kinds, _OWNED),
        relayed=_region(relay.owned if relay else [], kinds, _RELAYED),
        hop=hop,
        relay=relay,
        has_relay=any(relays),
        is_everywhere=[whole[table] for _, table, _, _ in rows],
    )


_RELAYED = {Kind.RELAYED, Kind.RELAYED_CUT, Kind.RELAYED_REPLICA}
_OWNED = {Kind.REPLICA, Kind.CUT, Kind.WHOLE, Kind.EMPTY}


def _region(
    features: Sequence[tuple[int, int, int, int]], kinds: Sequence[Kind], own: set[Kind]
) -> Region:
    numbers = [number for number, kind in enumerate(kinds) if kind in own]
    first, last = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
    relative = [(key, cell - first, pooling, width) for key, cell, pooling, width in features]
    return Region(first=first, last=last, features=_tensor(relative).view(-1, 4))


def _is_everywhere(placement: Placement, ranks: Ranks) -> bool:
    return placement.cells == ((tuple(range(ranks.world_size)),),)


def _gains_by_relay(placement: Placement, ranks: Ranks) -> bool:
    """Whether row blocks of some columns lie on several ranks of one host, of several hosts."""
    if len(ranks.hosts) == 1:
        return False
    for column in zip(*placement.cells, strict=True):
        found: dict[int, tuple[int, ...]] = {}
        for cell in column:
            for host, holders in ranks.by_host(cell).items():
                if found.setdefault(host, holders) != holders:
                    return True
    return False


def _list_cells(
    placements: Sequence[Placement], whole: Sequence[bool], relays: Sequence[bool], rank: int
) -> tuple[list[Cell], list[Kind]]:
    found: list[tuple[Kind, Cell]] = []
    for table, placement in enumerate(placements):
        own = list(_cells_of(table, placement, rank))
        is_cut = len(placement.column_cuts) > 2
        for cell in own:
            kind = Kind.WHOLE
            if whole[table]:
                kind = Kind.EVERYWHERE
            elif len(cell.replicas) > 1:
                kind = Kind.RELAYED_REPLICA if relays[table] else Kind.REPLICA
            elif is_cut:
                kind = Kind.RELAYED_CUT if relays[table] else Kind.CUT
            elif relays[table]:
                kind = Kind.RELAYED
            found.append((kind, cell))
        if not own:
            nothing = Part(0, 0, 0, placement.num_columns)
            found.append((Kind.EMPTY, Cell(table, nothing, (rank,), None)))
    found.sort(key=lambda one: one[0])  # stable: by table and block within a kind
    return [cell for _, cell in found], [kind for kind, _ in found]


def _cells_of(table: int, placement: Placement, rank: int) -> Iterator[Cell]:
    columns = list(pairwise(placement.column_cuts))
    for i, row in enumerate(placement.cells):
        for j, holders in enumerate(row):
            if rank in holders:
                first, last = placement.row_cuts[i : i + 2]
                left, right = columns[j]
                yield Cell(table, Part(first, last - first, left, right - left), holders, (i, j))


def _cut(
    placement: Placement, table: int, route: tuple[int, int, bool], feature: int, pooling: int
) -> Iterator[Stripe]:
    """Cut a feature into stripes."""
    key, mode, by_relay = route
    row_blocks = range(len(placement.cells))
    for j, (left, right) in enumerate(pairwise(placement.column_cuts)):
        holders = tuple(row[j] for row in placement.cells)
        yield Stripe(
            route=Route(key, mode, placement.row_cuts, holders, by_relay),
            table=table,
            column_block=j,
            row_blocks=row_blocks,
            feature=feature,
            pooling=pooling,
            columns=(left, right - left, placement.num_columns),
        )


def _second_stripes(relayed: Sequence[tuple[int, Stripe]], ranks: Ranks) -> list[Stripe]:
    """Give what a relay rank looks up among the ranks of its host, for all sources."""
    result = []
    for feature, (channel, stripe) in enumerate(relayed):
        rows = stripe.route.rows_by_host(ranks)[ranks.host]
        cuts = (*rows.starts.values(), rows.num_rows)
        width = stripe.columns[1]
        result.append(
            Stripe(
                route=Route(channel, PARTIALS, cuts, tuple(rows.holders), False),
                table=stripe.table,
                column_block=stripe.column_block,
                row_blocks=list(rows.starts),
                feature=feature,
                pooling=int(Pooling.SUM),
                columns=(0, width, width),
            )
        )
    return result
