"""Make replicas equal: the first rank of each replicated block sends it to the others.

A block on all ranks is broadcast. Of others the first rank sends 16 MB in all at a time, so that
the message needs little memory beside the tables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire
from shardwise.tables.store import Store

_ELEMENTS_AT_ONCE = 2**22


@torch.no_grad()
def equalize(stores: Sequence[Store], placements: Sequence[Placement], wire: Wire) -> None:
    """Copy rows and states of replicated blocks from their first rank to the others.

    Args:
        stores: What lies here; of a table without a slice here, one without rows.
        placements: Of all tables, the same on every rank.
        wire: Connects the ranks, each of which must call this.
    """
    known = {store.key: store for store in stores}  # the kinds of state of each table
    places = {(s.key, s.part.first_row, s.part.first_column): s for s in stores}
    for key, placement in enumerate(placements):
        if all(len(cell) == 1 for row in placement.cells for cell in row):
            continue
        for one in placement.slices():
            if len(one.ranks) == 1:
                continue
            held = places.get((key, one.rows[0], one.columns[0]), known[key])
            sizes = (one.rows[1] - one.rows[0], one.columns[1] - one.columns[0])
            for value in (held.weight, *held.states.values()):
                numel = torch.Size(sizes[: value.dim()]).numel()
                _spread(value.view(-1), numel, one.ranks, wire, f"table {one.table!r}")


def _spread(flat: Tensor, numel: int, ranks: Sequence[int], wire: Wire, tag: str) -> None:
    """Copy the memory of the first of some ranks to the others; those not among them look on."""
    first, others = ranks[0], ranks[1:]
    if len(ranks) == wire.world_size:
        wire.broadcast(flat, source=first, tag=tag)
        return
    at_once = max(1, _ELEMENTS_AT_ONCE // len(others))
    for start in range(0, numel, at_once):
        count = min(at_once, numel - start)
        piece = flat[start : start + count]
        sends, receives = wire.rank == first, wire.rank in others
        message = piece.repeat(len(others)) if sends else flat.new_empty(0)
        to = [count if sends and rank in others else 0 for rank in range(wire.world_size)]
        back = [count if receives and rank == first else 0 for rank in range(wire.world_size)]
        received = wire.all_to_all(message, to, back, tag=tag, lane="answers").wait()
        if receives:
            piece.copy_(received)
