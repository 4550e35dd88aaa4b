"""What lies where: slices of tables, and the one normal form that the exchange reads.

Any tiling of a table is cut along all row limits and all column limits that it needs, into a grid
of cells. Which sharding type, builder or person made the slices is gone by then.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

Answer = Literal["partials", "rows"]
"""How an owner answers: by one sum per non-empty bag, or by one vector per distinct id."""

Cell: TypeAlias = tuple[int, ...]
"""The ranks that hold a block of a table, ascending; several hold replicas."""

Lines: TypeAlias = Int64[np.ndarray, "n 5"]
"""One line per (block, rank): first row, last row + 1, first column, last column + 1, rank."""


@dataclass(frozen=True)
class Slice:
    """A block of a table and the ranks that hold it.

    Attributes:
        table: The table's name in its collection.
        rows: First row, and last row + 1; may be empty.
        columns: First column, and last column + 1.
        ranks: Who holds the block; several hold replicas.
        tier: The kind of memory; "memory", that of the rank's device, is the one there is.
    """

    table: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    ranks: tuple[int, ...]
    tier: str = "memory"

    def __post_init__(self) -> None:
        """Check what can be checked without the table."""
        name = f"table {self.table!r}, {_block(self.rows, self.columns)}"
        if self.rows[0] > self.rows[1] or self.columns[0] > self.columns[1]:
            raise ValueError(f"{name}: a slice must not end before it starts")
        if not self.ranks or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"{name}: wants one or more ranks, all different, got {self.ranks}")
        if self.tier != "memory":
            raise ValueError(f"{name}: tier {self.tier!r} is not available; leave it at 'memory'")


@dataclass(frozen=True)
class Placement:
    """All of one table as a grid; equal layouts have equal placements.

    A cut is there only if cells on its two sides differ somewhere along it.

    Attributes:
        table: The table's name in its collection.
        row_cuts: Ascending, from 0 to the table's rows.
        column_cuts: Ascending, from 0 to the table's columns.
        cells: The ranks of row block i, column block j, at [i][j].
        answer: How owners answer; sequence tables are always answered by "rows".
        relay: Whether ids for several ranks of one other host go there once.
    """

    table: str
    row_cuts: tuple[int, ...]
    column_cuts: tuple[int, ...]
    cells: tuple[tuple[Cell, ...], ...]
    answer: Answer = "partials"
    relay: bool = True

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.row_cuts[-1]

    @property
    def num_columns(self) -> int:
        """Columns of the table."""
        return self.column_cuts[-1]

    @property
    def ranks(self) -> Cell:
        """All ranks that hold something of the table, ascending."""
        return tuple(sorted({rank for row in self.cells for cell in row for rank in cell}))

    def slices(self) -> Iterator[Slice]:
        """Give the cells as slices, row block after row block."""
        for i, row in enumerate(self.cells):
            for j, cell in enumerate(row):
                rows, columns = self.row_cuts[i : i + 2], self.column_cuts[j : j + 2]
                yield Slice(self.table, (rows[0], rows[1]), (columns[0], columns[1]), cell)


def lines_of(slices: Iterable[Slice]) -> Lines:
    """Give slices as lines."""
    lines = [(*one.rows, *one.columns, rank) for one in slices for rank in one.ranks]
    return np.array(lines, dtype=np.int64).reshape(-1, 5)


def place(
    table: str,
    shape: tuple[int, int],
    lines: Lines,
    *,
    world_size: int,
    answer: Answer = "partials",
    relay: bool = True,
) -> Placement:
    """Bring any tiling of a table into the normal form.

    Args:
        table: The table's name.
        shape: Its rows and columns.
        lines: Blocks that tile it, in any order; empty ones are dropped, equal ones on several
            ranks are replicas.
        world_size: Ranks there are.
        answer: How owners answer.
        relay: Whether ids for several ranks of one other host go there once.

    Raises:
        ValueError: The blocks do not tile the table, or a rank does not exist.
    """
    lines = lines[(lines[:, 0] != lines[:, 1]) & (lines[:, 2] != lines[:, 3])]
    _check_limits(table, shape, lines, world_size)
    extents, numbers = np.unique(lines[:, :4], axis=0, return_inverse=True)
    holders = _gather_ranks(table, lines, numbers.reshape(-1), len(extents))
    codes = {cell: code for code, cell in enumerate(dict.fromkeys(holders))}
    owners = np.array([codes[cell] for cell in holders], dtype=np.int64)
    rows = np.unique(np.append(extents[:, :2], [0, shape[0]]))
    columns = np.unique(np.append(extents[:, 2:], [0, shape[1]]))
    cover, painted = _paint(extents, owners, rows, columns)
    if (cover != 1).any():
        raise ValueError(f"table {table!r}: " + _fault(cover, rows, columns, extents, holders))
    keep_row = np.append(True, (painted[1:] != painted[:-1]).any(1))
    keep_column = np.append(True, (painted[:, 1:] != painted[:, :-1]).any(0))
    cells = list(codes)
    return Placement(
        table,
        (*rows[:-1][keep_row].tolist(), shape[0]),
        (*columns[:-1][keep_column].tolist(), shape[1]),
        tuple(
            tuple(cells[code] for code in row) for row in painted[keep_row][:, keep_column].tolist()
        ),
        answer,
        relay,
    )


def _check_limits(table: str, shape: tuple[int, int], lines: Lines, world_size: int) -> None:
    beyond = (lines[:, :4] < 0) | (lines[:, :4] > np.repeat(shape, 2))
    foreign = (lines[:, 4] < 0) | (lines[:, 4] >= world_size)
    for line in lines[beyond.any(1)].tolist():
        raise ValueError(
            f"table {table!r}: a slice of {_block(line[:2], line[2:4])} is outside the table of "
            f"{shape[0]} rows and {shape[1]} columns"
        )
    for line in lines[foreign].tolist():
        raise ValueError(
            f"table {table!r}: {_block(line[:2], line[2:4])} is placed on rank {line[4]}, but "
            f"there are ranks 0 to {world_size - 1}"
        )


def _gather_ranks(
    table: str, lines: Lines, numbers: NDArray[np.int64], num_blocks: int
) -> list[Cell]:
    """Give the ranks of each block, of which `numbers` holds that of each line."""
    ranks = lines[:, 4].tolist()
    if len(lines) == num_blocks:
        return [(ranks[line],) for line in np.argsort(numbers).tolist()]
    gathered: list[list[int]] = [[] for _ in range(num_blocks)]
    for line in np.lexsort((lines[:, 4], numbers)).tolist():
        block = gathered[numbers[line]]
        if block and block[-1] == ranks[line]:
            first, last, left, right = lines[line, :4].tolist()
            raise ValueError(
                f"table {table!r}: {_block((first, last), (left, right))} is placed on rank "
                f"{ranks[line]} twice"
            )
        block.append(ranks[line])
    return [tuple(block) for block in gathered]


def _paint(
    extents: NDArray[np.int64],
    owners: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the blocks over each cell of the grid, and give the sum of their owners.

    By the differences at the four corners of each block, added up along both directions.
    """
    top, bottom = np.searchsorted(rows, extents[:, :2]).T
    left, right = np.searchsorted(columns, extents[:, 2:]).T
    corners = np.zeros((2, len(rows), len(columns)), dtype=np.int64)
    for i, j, sign in ((top, left, 1), (bottom, left, -1), (top, right, -1), (bottom, right, 1)):
        np.add.at(corners[0], (i, j), sign)
        np.add.at(corners[1], (i, j), sign * owners)
    cover, painted = corners.cumsum(1).cumsum(2)[:, :-1, :-1]
    return cover, painted


def _fault(
    cover: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    extents: NDArray[np.int64],
    holders: Sequence[Cell],
) -> str:
    """Say which cell of the grid is first in no block, or in several."""
    i, j = np.argwhere(cover != 1)[0].tolist()
    where = _block(rows[i : i + 2].tolist(), columns[j : j + 2].tolist())
    if cover[i, j] == 0:
        return f"{where} lie in no slice; slices must tile the table"
    inside = (extents[:, 0] <= rows[i]) & (rows[i] < extents[:, 1])
    inside &= (extents[:, 2] <= columns[j]) & (columns[j] < extents[:, 3])
    found = [
        f"{_block(extents[k, :2].tolist(), extents[k, 2:].tolist())} on ranks {holders[k]}"
        for k in np.flatnonzero(inside).tolist()
    ]
    return f"{where} lie in {len(found)} slices: {'; '.join(found)}; slices must tile the table"


def _block(rows: Sequence[int], columns: Sequence[int]) -> str:
    return f"rows [{rows[0]}, {rows[1]}), columns [{columns[0]}, {columns[1]})"
