"""Whether all ranks were given one plan, asked before anything moves.

Every rank sends 64 bytes to every other. Only where they differ follow 32 bytes per table, and then
a line on the first table that differs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Protocol, runtime_checkable

from shardwise.sharding.placement import Placement

_SHOWN_CUTS = 6


@runtime_checkable
class TextGatherer(Protocol):
    """What brings the texts of all ranks together, such as a `Wire`."""

    def gather_texts(self, text: str, /) -> list[str]:
        """Give the texts of all ranks, in rank order."""


def plan_hash(
    placements: Mapping[str, Sequence[Placement]], notes: Mapping[str, str] | None = None
) -> str:
    """Give a digest of where all tables lie, as 64 hexadecimal digits.

    It depends on where each row and column is and on nothing else, such as the sharding types; the
    order of modules and tables counts, as that of the collectives does.

    Args:
        placements: The tables of each collection, by its path.
        notes: What else counts, by the path.
    """
    return _digest("".join(f"{name}\n{one}\n" for name, one in _digests(placements, notes or {})))


def check_equal_plans(
    placements: Mapping[str, Sequence[Placement]],
    wire: TextGatherer,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Raise on all ranks if one of them places a table otherwise than rank 0.

    A collective: every rank calls it.

    Args:
        placements: The tables of each collection, by its path.
        wire: Brings texts of all ranks together.
        notes: What else must be equal, by the path of the collection.

    Raises:
        ValueError: Names the first rank that differs, and its first table that does.
    """
    notes = notes or {}
    if len(set(wire.gather_texts(plan_hash(placements, notes)))) == 1:
        return
    own = _digests(placements, notes)
    listings = [
        [tuple(line.split("\t")) for line in text.splitlines()]
        for text in wire.gather_texts("\n".join("\t".join(pair) for pair in own))
    ]
    rank = next(rank for rank, listing in enumerate(listings) if listing != listings[0])
    pairs = enumerate(zip_longest(listings[0], listings[rank]))
    place = next(place for place, (first, other) in pairs if first != other)
    said = wire.gather_texts(_describe(placements, notes, place))
    raise ValueError(
        f"plans differ between ranks: rank {rank} has {said[rank]}, rank 0 has {said[0]}; "
        f"give every rank the same plan"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(
    placements: Mapping[str, Sequence[Placement]], notes: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Name and digest of each table, and of what is noted of each collection."""
    found = []
    for path, tables in placements.items():
        found += [(repr((path, one.table)), _digest(repr(one))[:32]) for one in tables]
        found.append((repr(path), _digest(notes.get(path, ""))[:32]))
    return found


def _describe(
    placements: Mapping[str, Sequence[Placement]], notes: Mapping[str, str], place: int
) -> str:
    """Say what `_digests` has at a place."""
    for path, tables in placements.items():
        if place < len(tables):
            return f"table {tables[place].table!r} of module {path!r}: {_summary(tables[place])}"
        if place == len(tables):
            return f"module {path!r}: {notes.get(path, '') or 'no more tables'}"
        place -= len(tables) + 1
    return "no more modules"


def _summary(placement: Placement) -> str:
    cells = [cell for row in placement.cells for cell in row]
    ranks = ", ".join(str(list(cell)) for cell in cells[:_SHOWN_CUTS])
    dots = ", ..." if len(cells) > _SHOWN_CUTS else ""
    return (
        f"{placement.num_rows} x {placement.num_columns}, cut at rows "
        f"{_show(placement.row_cuts)} and columns {_show(placement.column_cuts)}, on ranks "
        f"{ranks}{dots}, answer {placement.answer}, relay {placement.relay}"
    )


def _show(cuts: Sequence[int]) -> str:
    shown = ", ".join(map(str, cuts[1:-1][:_SHOWN_CUTS]))
    return f"[{shown}{', ...' if len(cuts) - 2 > _SHOWN_CUTS else ''}]"
