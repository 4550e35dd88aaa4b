"""What the holders of one row tell each other: gradients between replicas, sums between columns.

All go as messages between the ranks concerned, in one all-to-all for all tables; who sends what is
known from the plan, so only numbers of rows go ahead.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.lookup import BadIds, Ids, Pooling, RowGrads, row_grads
from shardwise.ops.permute import permute_segments
from shardwise.sharding.layout import Cell
from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire


class Replicas:
    """Adds the gradients of replicas up, so that all apply the same.

    Of a slice on two ranks each sends the other its rows. With more of them, each holder adds up
    one part of the rows, in rank order, and sends the sums to all: never more bytes than those of
    dense gradients, and fewer than all rows to all once one row in n is touched on several ranks.

    Args:
        cells: The slices of this rank.
        placements: Of all tables.
        wire: Connects the ranks.
        path: The collection's, for messages.

    Attributes:
        numbers: Those of `cells` that have replicas.
        features: What `merge` gives gradients of: a lookup of these slices without pooling.
    """

    def __init__(
        self, cells: Sequence[Cell], placements: Sequence[Placement], wire: Wire, path: str
    ) -> None:
        """Find the slices with replicas, and who must hear of them."""
        self._wire, self._path = wire, path
        counts = {len(ranks) for p in placements for row in p.cells for ranks in row}
        self._are_any, self._by_parts = max(counts, default=1) > 1, max(counts, default=1) > 2
        self.numbers = [i for i, cell in enumerate(cells) if len(cell.replicas) > 1]
        own = [cells[i] for i in self.numbers]
        for cell in own:
            if cell.part.num_rows >= 2**31:
                raise ValueError(
                    f"table {placements[cell.table].table!r}: a slice of {cell.part.num_rows} rows "
                    f"has replicas on ranks {cell.replicas}; cut it below {2**31} rows"
                )
        rows = torch.tensor([cell.part.num_rows for cell in own], dtype=torch.int64)
        self._widths = torch.tensor([c.part.num_columns for c in own], dtype=torch.int64)
        self.features = _features(self._widths)
        holders = [torch.tensor(cell.replicas) for cell in own]
        counts_of = torch.tensor([len(each) for each in holders], dtype=torch.int64)
        ranks = torch.cat([torch.empty(0, dtype=torch.int64), *holders])  # cell after cell
        cell_of = torch.arange(len(own)).repeat_interleave(counts_of)
        place = torch.arange(len(ranks)) - (counts_of.cumsum(0) - counts_of)[cell_of]
        self._first_keys = rows.cumsum(0) - rows
        self._part_ends = self._first_keys[cell_of] + (
            rows[cell_of] * (place + 1) // counts_of[cell_of]
        )
        self._to_parts = ranks.argsort(stable=True)  # by rank, then by cell
        self._to_all = cell_of[self._to_parts]
        self._ranks = ranks[self._to_parts]
        peers, peer_of = self._ranks.unique(return_inverse=True)
        self._bags = torch.zeros(len(own), len(peers), dtype=torch.int64)
        self._bags[self._to_all, peer_of] = 1
        self._num_shared = torch.bincount(self._ranks, minlength=wire.world_size)

    def merge(
        self, found: Mapping[int, RowGrads], tables: Sequence[Tensor]
    ) -> tuple[Tensor, Ids] | None:
        """Bring together the gradients of all holders; every rank must call this.

        Args:
            found: By slice, distinct rows and their gradients.
            tables: The slices of this rank.

        Returns:
            The gradient of a lookup of the slices `numbers`, and what it has looked up; the same
            on all holders of a slice. None if there are no such slices here.
        """
        if not self._are_any:
            return None
        own = [found[i] for i in self.numbers]
        if self._by_parts:
            merged = self._send_rows(own, self._to_parts)
            own = row_grads(*merged, [tables[i] for i in self.numbers]) if own else own
        merged = self._send_rows(own, None)
        return merged if own else None

    def _send_rows(self, own: Sequence[RowGrads], parts: Tensor | None) -> tuple[Tensor, Ids]:
        """Send rows with their gradients to the holders: all, or to each those of its part."""
        none = torch.empty(0)
        rows = torch.cat([none.int(), *(rows.int() for rows, _ in own)])
        grads = torch.cat([none, *(grads.flatten() for _, grads in own)])
        sizes = torch.tensor([len(rows) for rows, _ in own], dtype=torch.int64)
        order, widths = self._to_all, self._widths[self._to_all]
        segments = self._widths
        if parts is not None:
            keys = rows.cpu() + self._first_keys.repeat_interleave(sizes)
            sizes = torch.searchsorted(keys, self._part_ends).diff(prepend=sizes.new_zeros(1))
            order, segments = parts, segments.new_empty(len(parts)).index_copy_(0, parts, widths)
        counts, shared = sizes[order], self._num_shared
        told = self._send(counts.int().to(rows.device), shared, shared, "numbers of rows")
        arrived = told.cpu().long()
        ids = self._send(
            self._arrange(rows, sizes, order), self._sums(counts), self._sums(arrived), "rows"
        )
        flat = self._send(
            self._arrange(grads, sizes * segments, order),
            self._sums(counts * widths),
            self._sums(arrived * widths),
            "gradients",
        )
        offsets = torch.cat([arrived.new_zeros(1), arrived.cumsum(0)]).to(ids.device)
        call = Ids(ids, offsets, none, False, self.features, self._bags, False, int(BadIds.RAISE))
        return flat[:, None], call

    def _arrange(self, values: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
        """Copy segments of some sizes into the order in which they travel."""
        if order is self._to_all and bool(self._bags.all()):  # the same for every rank
            sizes, order = sizes.sum().view(1), order.new_zeros(self._bags.shape[1])
        is_there = sizes > 0
        place = is_there.cumsum(0) - 1
        order, sizes = place[order[is_there[order]]], sizes[is_there]
        lengths = torch.zeros(0, dtype=torch.int32)
        bags = [0] * len(sizes)
        return permute_segments(lengths, values, None, order.tolist(), bags, sizes.tolist())[1]

    def _sums(self, counts: Tensor) -> Tensor:
        """Add up what goes to, or comes from, each rank."""
        return counts.new_zeros(self._wire.world_size).index_add_(0, self._ranks, counts)

    def _send(self, send: Tensor, sizes: Tensor, receive_sizes: Tensor, what: str) -> Tensor:
        return self._wire.all_to_all(
            send,
            sizes.tolist(),
            receive_sizes.tolist(),
            tag=f"{what} of replicas of {self._path}",
            lane="answers",
            is_agreed=True,
        ).wait()


def _features(widths: Tensor) -> Tensor:
    """Describe a lookup without pooling of slices of these widths."""
    numbers = torch.arange(len(widths))
    return torch.stack([numbers, numbers, torch.full_like(numbers, Pooling.NONE), widths], 1)


class Transfer(NamedTuple):
    """The sums of one block of rows and columns, on their way."""

    rank: int  # the other one
    table: int
    row_block: int
    column_block: int


class RowSums:
    """Completes row sums of slices whose rows go on in other columns.

    Holders of the same rows have touched the same ones, so no ids travel. Of replicas the first one
    speaks. Sums are added in the order of columns.

    Args:
        cells: The slices whose sums there are, in order.
        placements: Of all tables.
        wire: Connects the ranks.
        path: The collection's, for messages.
        is_agreed: Whether all ranks know from an earlier message that this one comes.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        placements: Sequence[Placement],
        wire: Wire,
        path: str,
        *,
        is_agreed: bool = False,
    ) -> None:
        """Find who must hear from whom."""
        self._wire, self._tag, self._is_agreed = wire, f"row sums of {path}", is_agreed
        self._columns = [len(placements[cell.table].column_cuts) - 1 for cell in cells]
        self._places = {(c.table, *c.block): n for n, c in enumerate(cells) if c.block is not None}
        self._keys = [(c.table, *c.block) if c.block else None for c in cells]
        sends, receives = set[Transfer](), set[Transfer]()
        for (table, i, j), place in self._places.items():
            row = placements[table].cells[i]
            for other in range(self._columns[place]):
                if other == j:
                    continue
                if (table, i, other) not in self._places:
                    receives.add(Transfer(row[other][0], table, i, other))
                if row[j][0] == wire.rank:
                    sends |= {
                        Transfer(rank, table, i, j)
                        for rank in row[other]
                        if rank not in row[j] and rank != wire.rank
                    }
        self._sends, self._receives = sorted(sends), sorted(receives)

    def __call__(self, sums: Tensor, counts: Sequence[int]) -> Tensor:
        """Give the sums of whole rows; every rank must call this.

        Args:
            sums: Of the columns here [N, k], slice after slice.
            counts: Rows of each slice.
        """
        width = sums.shape[1]
        own: list[Tensor] = list(sums.split(list(counts)))
        parts = [own[self._places[t.table, t.row_block, t.column_block]] for t in self._sends]
        rows = {key[:2]: len(own[n]) for key, n in self._places.items()}
        limits = [rows[t.table, t.row_block] for t in self._receives]
        send_sizes, receive_sizes = [0] * self._wire.world_size, [0] * self._wire.world_size
        for transfer, part in zip(self._sends, parts, strict=True):
            send_sizes[transfer.rank] += part.numel()
        for transfer, count in zip(self._receives, limits, strict=True):
            receive_sizes[transfer.rank] += count * width
        flat = torch.cat([sums.new_empty(0), *(part.flatten() for part in parts)])
        received = self._wire.all_to_all(
            flat,
            send_sizes,
            receive_sizes,
            tag=self._tag,
            lane="answers",
            is_agreed=self._is_agreed,
        ).wait()
        pieces = received.split([count * width for count in limits])
        there: dict[tuple[int, ...], Tensor] = {
            t[1:]: piece.view(-1, width) for t, piece in zip(self._receives, pieces, strict=True)
        }
        there |= {key: own[n] for key, n in self._places.items()}
        totals = [self._total(n, own[n], there) for n in range(len(own))]
        return torch.cat([sums[:0], *totals])

    def _total(self, place: int, own: Tensor, there: Mapping[tuple[int, ...], Tensor]) -> Tensor:
        key = self._keys[place]
        if key is None or self._columns[place] == 1:
            return own
        total = there[key[0], key[1], 0].clone()
        for column in range(1, self._columns[place]):
            total += there[key[0], key[1], column]
        return total
