"""How the ids of one feature get to the rows of one column block.

A *stripe* is one feature's share of one column block. Its *route*, which input it reads and which
ranks hold the row blocks, may be that of other stripes too (column blocks on one rank, tables of
equal shape read by one feature): they share a *split* of the ids. A split has *slots*: one per row
block, or, where it goes by relay, one per host, whose rows are then numbered through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardwise.sharding.environment import Hosts
from shardwise.sharding.placement import Cell as Holders

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Who takes part in a hop, seen from one of them."""

    rank: int
    hosts: Hosts

    @property
    def world_size(self) -> int:
        """How many there are."""
        return sum(map(len, self.hosts))

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """The host of each rank, and its number there."""
        return {
            rank: (host, number)
            for host, ranks in enumerate(self.hosts)
            for number, rank in enumerate(ranks)
        }

    @property
    def host(self) -> int:
        """This host."""
        return self.places[self.rank][0]

    @property
    def number_on_host(self) -> int:
        """Where this rank stands among those of its host."""
        return self.places[self.rank][1]

    def choose(self, holders: Holders) -> int:
        """Pick the replica to ask: this rank, else one of its host, else any; shared out evenly."""
        if len(holders) == 1:
            return holders[0]
        if self.rank in holders:
            return self.rank
        near = [rank for rank in holders if self.places[rank][0] == self.host]
        if near:
            return _share_out(near, self.number_on_host, len(self.hosts[self.host]))
        return _share_out(holders, self.rank, self.world_size)

    def by_host(self, holders: Holders) -> dict[int, Holders]:
        """Give the holders of each host, numbered there."""
        result: dict[int, Holders] = {}
        for host, number in sorted(self.places[rank] for rank in holders):
            result[host] = (*result.get(host, ()), number)
        return result


def _share_out(of: Sequence[int], number: int, count: int) -> int:
    """Pick for the number-th of `count` askers, evenly.

    Neighbours in turn, others by runs of askers: so the replicas of groups of ranks, of whichever
    of the two kinds these are (see `two_dim`), are asked by their own group only.
    """
    is_run = of[-1] - of[0] == len(of) - 1
    return of[number % len(of) if is_run else number * len(of) // count]


class Slots(NamedTuple):
    """The slots of a route."""

    holders: Sequence[Holders]
    chosen: Sequence[int]  # of the holders, the rank that this one sends to
    blocks: Ints  # [blocks, 3]: end row, slot, base; of row blocks that differ in these
    num_rows: int  # of the largest slot, the same seen from every rank


class Route(NamedTuple):
    """What a split is made from."""

    input: int
    mode: int
    row_cuts: tuple[int, ...]
    holders: tuple[Holders, ...]  # of each row block
    by_relay: bool

    def slots(self, ranks: Ranks) -> Slots:
        """Find the slots."""
        return self._slots_by_host(ranks) if self.by_relay else self._slots_by_block(ranks)

    def _slots_by_block(self, ranks: Ranks) -> Slots:
        cuts = np.array(self.row_cuts)
        blocks = np.stack([cuts[1:], np.arange(len(cuts) - 1), cuts[:-1]], 1)
        chosen = [ranks.choose(cell) for cell in self.holders]
        return Slots(self.holders, chosen, blocks, int(np.diff(cuts).max()))

    def _slots_by_host(self, ranks: Ranks) -> Slots:
        rows = self.rows_by_host(ranks)
        slots = {host: slot for slot, host in enumerate(rows)}
        blocks = []
        for block, (first, end) in enumerate(pairwise(self.row_cuts)):
            hosts = sorted(ranks.by_host(self.holders[block]))
            is_here = ranks.host in hosts
            host = ranks.host if is_here else _share_out(hosts, ranks.host, len(ranks.hosts))
            blocks.append((end, slots[host], first - rows[host].starts[block]))
        members = [ranks.hosts[host] for host in rows]
        chosen = [host[ranks.number_on_host % len(host)] for host in members]
        table = np.array(blocks)
        ends_run = np.append((table[1:, 1:] != table[:-1, 1:]).any(1), True)
        return Slots(members, chosen, table[ends_run], max(r.num_rows for r in rows.values()))

    def rows_by_host(self, ranks: Ranks) -> dict[int, "HostRows"]:
        """Number the rows that each host holds."""
        result: dict[int, HostRows] = {}
        for block, (first, end) in enumerate(pairwise(self.row_cuts)):
            for host, numbers in ranks.by_host(self.holders[block]).items():
                result.setdefault(host, HostRows()).add(block, end - first, numbers)
        return dict(sorted(result.items()))


@dataclass
class HostRows:
    """The row blocks that a host holds, put together.

    Attributes:
        starts: Where each block of the table begins here.
        holders: The ranks of each, numbered on the host.
        num_rows: Of all.
    """

    starts: dict[int, int] = field(default_factory=dict)
    holders: list[Holders] = field(default_factory=list)
    num_rows: int = 0

    def add(self, block: int, num_rows: int, holders: Holders) -> None:
        """Put a block at the end."""
        self.starts[block] = self.num_rows
        self.holders.append(holders)
        self.num_rows += num_rows


@dataclass(frozen=True)
class Stripe:
    """One feature's share of one column block.

    Attributes:
        route: How its ids travel.
        table: The table's number.
        column_block: The column block's number.
        row_blocks: Which row block of the table each row block of the route is.
        feature: The feature's number within the hop's output.
        pooling: How the source makes one vector of a bag.
        columns: First column within the feature, columns here, columns of the feature.
    """

    route: Route
    table: int
    column_block: int
    row_blocks: Sequence[int]
    feature: int
    pooling: int
    columns: tuple[int, int, int]
