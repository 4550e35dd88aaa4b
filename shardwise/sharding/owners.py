"""What the holder of slices does with the gradients that arrive.

Slices whose rows nobody else holds, whole or in part, are updated at once, inside the operators.
Of replicas, and of rows of which a rule must know further columns that lie elsewhere, the gradients
of the distinct rows are made first; then replicas add theirs up, row sums are exchanged (see
`rows`), and the rule runs. Every rank takes part in these messages, whatever it holds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from shardwise.ops.lookup import (
    Ids,
    RowGrads,
    Update,
    Way,
    apply_completed,
    dense_grads,
    restrict,
    row_grads,
    run_update,
    sparse_grads,
    weight_grads,
)
from shardwise.optim.slices import WholeRows
from shardwise.sharding.layout import Layout, Region
from shardwise.sharding.placement import Placement
from shardwise.sharding.rows import Replicas, RowSums
from shardwise.sharding.wire import Wire


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionWay:
    """How gradients of one lookup reach its slices, which are numbered within the region.

    Attributes:
        way: Of those that need no other rank.
        explicit: The others, and
        features: the lookup's features that read them.
    """

    way: Way
    explicit: tuple[int, ...]
    features: Tensor

    def bring_back(
        self, grad: Tensor, call: Ids, tables: Sequence[Tensor], wants_weights: bool
    ) -> tuple[Tensor | None, dict[int, Tensor], dict[int, RowGrads]]:
        """Take the gradient of a lookup's result to its slices.

        Returns:
            The gradient of the weights [V], if asked for; gradients of slices that keep one; and
            distinct rows with their gradients of slices that need other ranks.
        """
        weights = weight_grads(grad, call, tables) if wants_weights else None  # before any update
        grads: dict[int, Tensor] = {}
        touched: dict[int, RowGrads] = {}
        if self.way.dense:
            found = dense_grads(grad, call, self.way, tables)
            grads |= zip(self.way.dense, found, strict=True)
        if self.way.sparse:
            found = sparse_grads(grad, call, self.way, tables)
            grads |= zip(self.way.sparse, found, strict=True)
        if self.explicit:
            own = call._replace(features=self.features)
            pairs = row_grads(grad, own, [tables[t] for t in self.explicit])
            touched |= zip(self.explicit, pairs, strict=True)
        for update in self.way.updates:
            run_update(grad, call, update, tables)
        return weights, grads, touched


@dataclass(frozen=True, kw_only=True, eq=False)
class SlicesWay(Way):
    """How gradients reach the slices here: those without a rule, by `sparse` and `dense`.

    Attributes:
        regions: By the first cell of a region and the one after its last.
        replicas: What becomes of merged gradients of replicas; see `rows.Replicas`.
        explicit: Slices that need other ranks.
        last: Rules with row sums that other ranks complete, for slices by number.
    """

    regions: dict[tuple[int, int], RegionWay]
    replicas: RegionWay
    explicit: frozenset[int]
    last: tuple[Update, ...]

    def of(self, region: Region) -> RegionWay:
        """Give the way of a region."""
        return self.regions[region.first, region.last]


class Owners:
    """The slices of this rank, and what binds them to those of other ranks.

    Args:
        layout: What lies here.
        placements: Of all tables.
        wire: Connects the ranks.
        path: The collection's, for messages.
    """

    def __init__(
        self, layout: Layout, placements: Sequence[Placement], wire: Wire, path: str
    ) -> None:
        """Find who holds the same rows."""
        self._layout, self._cells = layout, layout.cells
        self._placements, self._wire, self._path = placements, wire, path
        self._replicas = Replicas(layout.cells, placements, wire, path)
        self._is_cut = [len(p.column_cuts) > 2 for p in placements]

    def complete(self, update: Update) -> Update:
        """Let a rule wait for the row sums of whole rows, where columns are cut and it has any."""
        cells = [self._cells[cell] for cell in update.tables]
        if not self._has_cut_rows(update):
            return update
        return replace(update, complete=RowSums(cells, self._placements, self._wire, self._path))

    def _has_cut_rows(self, update: Update) -> bool:
        """Whether a rule has row sums of columns on several ranks; alike on all ranks."""
        is_cut = any(self._is_cut[self._cells[cell].table] for cell in update.tables)
        return update.rule.num_sums > 0 and is_cut

    @cached_property
    def _row_sums(self) -> RowSums:
        return RowSums(self._cells, self._placements, self._wire, self._path)

    @property
    def whole_rows(self) -> WholeRows | None:
        """What completes row sums for an optimizer of gradients; None if all rows are whole."""
        return self if any(self._is_cut) else None

    def mean(self, sums: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Give means over whole rows [N] from sums over the columns of slices, by their number."""
        none = torch.empty(0)
        every = [sums.get(cell, none) for cell in range(len(self._cells))]
        counts = [len(one) for one in every]
        totals = self._row_sums(torch.cat(every)[:, None], counts).split(counts)
        widths = [self._placements[cell.table].num_columns for cell in self._cells]
        return {cell: totals[cell][:, 0] / widths[cell] for cell in sums}

    # ---- planning

    def plan_backward(self, updates: Sequence[Update], *, is_sparse: bool) -> SlicesWay:
        """Choose each slice's way of backward.

        Args:
            updates: Rules, each for all slices here of some tables.
            is_sparse: Row-sparse gradients for slices without a rule.

        Raises:
            ValueError: Two rules own one slice.
        """
        every = range(len(self._cells))
        owned = [cell for update in updates for cell in update.tables]
        if len(owned) != len(set(owned)):
            raise ValueError(f"two update rules own one slice: {sorted(owned)}")
        fused = [update for update in updates if update.in_backward]
        cut = [update for update in fused if self._has_cut_rows(update)]
        explicit = set(self._replicas.numbers)
        for update in cut:
            own = [self._cells[cell] for cell in update.tables]
            explicit |= {
                number
                for number, cell in zip(update.tables, own, strict=True)
                if self._is_cut[cell.table] and cell.block is not None
            }
        at_step = {c for update in updates if not update.in_backward for c in update.tables}
        plain = set(every) - set(owned)
        sparse = at_step | plain if is_sparse else at_step
        dense = plain - sparse
        layout = self._layout
        regions = {
            (region.first, region.last): _plan_region(
                range(region.first, region.last), region.features, fused, explicit, sparse, dense
            )
            for region in (layout.everywhere, layout.owned, layout.relayed)
        }
        replicas, completed = self._replicas, {c for update in cut for c in update.tables}
        return SlicesWay(
            updates=(),
            sparse=tuple(sorted(sparse)),
            sparse_features=torch.empty(0, 4, dtype=torch.int64),
            dense=tuple(sorted(dense)),
            dense_features=torch.empty(0, 4, dtype=torch.int64),
            regions=regions,
            replicas=_plan_region(
                replicas.numbers, replicas.features, fused, completed, sparse, dense
            ),
            explicit=frozenset(explicit),
            last=tuple(self._at_last(update, explicit) for update in cut),
        )

    def _at_last(self, update: Update, explicit: Collection[int]) -> Update:
        """Give the part of a rule that waits for row sums; others may wait for those from here."""
        part = _share(update, explicit, range(len(self._cells)))
        cells = [self._cells[cell] for cell in part.tables]
        sums = RowSums(cells, self._placements, self._wire, self._path, is_agreed=True)
        return replace(part, complete=sums)

    # ---- backward

    def finish(
        self, touched: Mapping[int, RowGrads], tables: Sequence[Tensor], way: SlicesWay
    ) -> dict[int, Tensor]:
        """Bring the gradients of slices that need other ranks to an end; every rank must.

        Args:
            touched: Distinct rows and their gradients, by the slice's number.
            tables: All slices here.
            way: What becomes of them.

        Returns:
            Gradients of the slices that keep one, by number.
        """
        found = {c: touched.get(c) or _no_rows(tables[c]) for c in way.explicit}
        result: dict[int, Tensor] = {}
        merged = self._replicas.merge(found, tables)
        if merged is not None:
            numbers = self._replicas.numbers
            _, grads, rows = way.replicas.bring_back(*merged, [tables[c] for c in numbers], False)
            result = {numbers[place]: one for place, one in grads.items()}
            found |= {numbers[place]: pair for place, pair in rows.items()}
        for update in way.last:
            own = [tables[cell] for cell in update.tables]
            apply_completed(update, own, [found[cell] for cell in update.tables])
        return result


def _no_rows(table: Tensor) -> RowGrads:
    return torch.empty(0, dtype=torch.int64), torch.empty(0, table.shape[1])


def _plan_region(
    own: Sequence[int],
    features: Tensor,
    updates: Sequence[Update],
    explicit: Collection[int],
    sparse: Collection[int],
    dense: Collection[int],
) -> RegionWay:
    """Plan the backward of a lookup that reads the slices `own`."""
    fast = {cell for cell in own if cell not in explicit}

    def places(cells: Collection[int]) -> tuple[int, ...]:
        return tuple(place for place, cell in enumerate(own) if cell in cells)

    shares = [_share(update, fast, own) for update in updates]
    by_rows, dense_ones = places(fast & {*sparse}), places(fast & {*dense})
    way = Way(
        updates=tuple(
            replace(share, features=restrict(features, share.tables))
            for share in shares
            if share.tables
        ),
        sparse=by_rows,
        sparse_features=restrict(features, by_rows),
        dense=dense_ones,
        dense_features=restrict(features, dense_ones),
    )
    others = places(explicit)
    return RegionWay(way=way, explicit=others, features=restrict(features, others))


def _share(update: Update, cells: Collection[int], own: Sequence[int]) -> Update:
    """Take the part of a rule that is of some slices, numbered within `own`.

    They are a run of the rule's slices (see `layout.Kind`), so its steps stay one tensor.
    """
    places = [place for place, cell in enumerate(update.tables) if cell in cells]
    low, high = (places[0], places[-1] + 1) if places else (0, 0)
    assert high - low == len(places), "slices are ordered by what their gradients need"
    count, number = len(update.rule.states), {cell: place for place, cell in enumerate(own)}
    return replace(
        update,
        tables=tuple(number[cell] for cell in update.tables[low:high]),
        states=update.states[low * count : high * count],
        steps=update.steps[low:high],
        slots=update.slots[low:high],
        complete=None,
    )
