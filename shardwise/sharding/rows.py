"""What the holders of one row tell each other: gradients between replicas, sums between columns.

All go as messages between the ranks concerned, in one all-to-all for all tables; who sends what is
known from the plan, so only numbers of rows go ahead.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.lookup import RowGrads, sum_rows
from shardwise.sharding.layout import Cell
from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire


class Replicas:
    """Adds the gradients of replicas up, so that all apply the same.

    Per slice all its holders choose alike, from the numbers of rows, what sends fewer bytes: each
    row's gradient to all, added in rank order; or dense gradients, each holder adding one part of
    the rows and sending the sums to all.

    Args:
        cells: The slices of this rank.
        placements: Of all tables.
        wire: Connects the ranks.
        path: The collection's, for messages.
    """

    def __init__(
        self, cells: Sequence[Cell], placements: Sequence[Placement], wire: Wire, path: str
    ) -> None:
        """Find the slices with replicas."""
        self._wire, self._path = wire, path
        self._cells = [(i, cell) for i, cell in enumerate(cells) if len(cell.replicas) > 1]
        for _, cell in self._cells:
            if cell.part.num_rows >= 2**31:
                raise ValueError(
                    f"table {placements[cell.table].table!r}: a slice of {cell.part.num_rows} rows "
                    f"has replicas on ranks {cell.replicas}; cut it below {2**31} rows"
                )
        self._are_any = any(
            len(ranks) > 1 for placement in placements for row in placement.cells for ranks in row
        )
        self._shared = [
            [k for k, (_, cell) in enumerate(self._cells) if rank in cell.replicas]
            for rank in range(wire.world_size if self._cells else 0)
        ] or [[] for _ in range(wire.world_size)]

    def merge(self, found: Mapping[int, RowGrads], tables: Sequence[Tensor]) -> dict[int, RowGrads]:
        """Give the gradients summed over all holders; every rank must call this.

        Args:
            found: By slice, distinct rows and their gradients.
            tables: The slices of this rank.
        """
        merged = dict(found)
        if not self._are_any:
            return merged
        own = [found[i] for i, _ in self._cells]
        counts = self._count([rows.numel() for rows, _ in own])
        is_dense = [
            sum(each.values()) * (grads.shape[1] * 4 + 4)
            > 2 * cell.part.num_rows * (grads.shape[1] + 1) * 4
            for (_, cell), (_, grads), each in zip(self._cells, own, counts, strict=True)
        ]
        full = {
            k: _densify(*own[k], cell.part.num_rows)
            for k, (_, cell) in enumerate(self._cells)
            if is_dense[k]
        }
        first = self._send_first(own, full, counts)
        parts = {  # sums in rank order
            k: reduce(torch.add, [first[rank][k] for rank in self._cells[k][1].replicas])
            for k in full
        }
        second = self._send_parts(parts)
        for k in full:
            i, cell = self._cells[k]
            whole = torch.cat([second[rank][k] for rank in cell.replicas])
            rows = whole[:, -1].nonzero()[:, 0]
            merged[i] = rows, whole[rows, :-1]
        return merged | self._sum_rows(first, tables, [k for k in range(len(own)) if k not in full])

    def _sum_rows(
        self, received: Sequence[Mapping[int, Tensor]], tables: Sequence[Tensor], ks: Sequence[int]
    ) -> dict[int, RowGrads]:
        """Add up rows that came with their gradients, in rank order."""
        numbers = [self._cells[k][0] for k in ks]
        joined = [torch.cat([received[rank][k] for rank in self._cells[k][1].replicas]) for k in ks]
        rows = [one[:, 0].contiguous().view(torch.int32).long() for one in joined]
        grads = [one[:, 1:] for one in joined]
        return dict(zip(numbers, sum_rows([tables[i] for i in numbers], rows, grads), strict=True))

    def _count(self, own: Sequence[int]) -> list[dict[int, int]]:
        """Give, per slice with replicas, how many rows each holder has."""
        sizes = [len(shared) for shared in self._shared]
        send = torch.tensor([own[k] for shared in self._shared for k in shared], dtype=torch.int64)
        received = self._send(send, sizes, sizes, "rows of replicas")
        counts: list[dict[int, int]] = [{} for _ in own]
        for rank, (shared, part) in enumerate(zip(self._shared, received, strict=True)):
            for k, count in zip(shared, part.tolist(), strict=True):
                counts[k][rank] = count
        return counts

    def _send_first(
        self,
        own: Sequence[RowGrads],
        full: Mapping[int, Tensor],
        counts: Sequence[Mapping[int, int]],
    ) -> list[dict[int, Tensor]]:
        """Exchange rows with their gradients, and the parts of dense gradients."""
        sparse = {
            k: torch.cat([rows.int().view(torch.float32)[:, None], grads], 1)
            for k, (rows, grads) in enumerate(own)
            if k not in full
        }

        def shape(k: int, receiver: int, sender: int) -> tuple[int, int]:
            cell, width = self._cells[k][1], own[k][1].shape[1] + 1
            if k not in full:
                return counts[k][sender], width
            first, last = _part(cell.part.num_rows, cell.replicas, receiver)
            return last - first, width

        def piece(k: int, receiver: int) -> Tensor:
            if k not in full:
                return sparse[k]
            cell = self._cells[k][1]
            return full[k][slice(*_part(cell.part.num_rows, cell.replicas, receiver))]

        return self._exchange(piece, shape, "gradients of replicas")

    def _send_parts(self, parts: Mapping[int, Tensor]) -> list[dict[int, Tensor]]:
        """Exchange the sums of the parts of dense gradients."""

        def shape(k: int, receiver: int, sender: int) -> tuple[int, int]:
            if k not in parts:
                return 0, 1
            cell = self._cells[k][1]
            first, last = _part(cell.part.num_rows, cell.replicas, sender)
            return last - first, parts[k].shape[1]

        def piece(k: int, receiver: int) -> Tensor:
            return parts[k] if k in parts else torch.empty(0, 1)

        return self._exchange(piece, shape, "sums of replicas")

    def _exchange(
        self,
        piece: Callable[[int, int], Tensor],
        shape: Callable[[int, int, int], tuple[int, int]],
        tag: str,
    ) -> list[dict[int, Tensor]]:
        """Send each holder `piece(slice, receiver)`; give what each rank sent, by slice.

        What is received has `shape(slice, receiver, sender)`.
        """
        me, ranks = self._wire.rank, range(self._wire.world_size)
        sends = [[piece(k, rank).reshape(-1) for k in self._shared[rank]] for rank in ranks]
        shapes = [[shape(k, me, rank) for k in self._shared[rank]] for rank in ranks]
        flat = torch.cat([torch.empty(0), *(part for parts in sends for part in parts)])
        send_sizes = [sum(part.numel() for part in parts) for parts in sends]
        receive_sizes = [sum(rows * width for rows, width in each) for each in shapes]
        received = self._send(flat, send_sizes, receive_sizes, tag)
        result = []
        for rank in ranks:
            pieces = received[rank].split([rows * width for rows, width in shapes[rank]])
            shaped = [p.view(each) for p, each in zip(pieces, shapes[rank], strict=True)]
            result.append(dict(zip(self._shared[rank], shaped, strict=True)))
        return result

    def _send(
        self, send: Tensor, sizes: Sequence[int], receive_sizes: Sequence[int], tag: str
    ) -> tuple[Tensor, ...]:
        pending = self._wire.all_to_all(
            send,
            sizes,
            receive_sizes,
            tag=f"{tag} of {self._path}",
            lane="answers",
            is_agreed=True,
        )
        parts: tuple[Tensor, ...] = pending.wait().split(list(receive_sizes))
        return parts


def _densify(rows: Tensor, grads: Tensor, num_rows: int) -> Tensor:
    """Give gradients of all rows, and in the last column whether a row has one."""
    full = torch.zeros(num_rows, grads.shape[1] + 1)
    full[rows, :-1] = grads
    full[rows, -1] = 1
    return full


def _part(num_rows: int, replicas: Sequence[int], rank: int) -> tuple[int, int]:
    """Give the rows whose gradients one of the holders adds up."""
    place, count = replicas.index(rank), len(replicas)
    return num_rows * place // count, num_rows * (place + 1) // count


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
