"""Tell who keeps count of changes which rows an update has changed.

A table has such a one as its attribute `delta_store` (see `tables.tracking`), with a method `mark`
that takes row numbers; most tables have none, and then this costs one look at each table.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardwise.ops.lookup.reference import IGNORE, RAISE, Ids, groups, resolve


def is_watched(table: Tensor) -> bool:
    """Whether somebody keeps count of the rows of a table that change."""
    return hasattr(table, "delta_store")


def tell_touched(call: Ids, tables: Sequence[Tensor]) -> None:
    """Tell the rows that an update for a call has changed, repeated ones as often.

    Args:
        call: What was looked up, its features with tables in the numbering of `tables`.
        tables: The tables that the update owns.
    """
    stores: list[Any] = [getattr(table, "delta_store", None) for table in tables]
    if not any(store is not None for store in stores):
        return
    call = call._replace(offsets=call.offsets.cpu())  # read one by one
    is_checked = call.bad_ids == RAISE and call.ids.device.type == "cpu"
    if call.bad_ids == RAISE:
        call = call._replace(bad_ids=IGNORE)  # as on a GPU, where the error comes later
    for group in groups(call, 0):
        if group.table < 0 or stores[group.table] is None:
            continue
        if is_checked:
            rows = call.ids[group.start : group.stop]
        else:
            rows, _ = resolve(call, group, tables[group.table].shape[0])
        stores[group.table].mark(rows)
