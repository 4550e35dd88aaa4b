"""What each user took, in order: made of any table of events, or read from a file of sequences.

Items are numbered 1, 2, …; 0 is left for padding. How sequences become batches of a causal model is
left to `sequence_samples`.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from shardwise.data.earlier import concatenated_ranges
from shardwise.data.folders import find_file

S3REC_FETCH = (
    "get Beauty.txt (or Toys_and_Games.txt, …) from the data folder of "
    "https://github.com/RUCAIBox/CIKM2020-S3Rec"
)

_LINE = re.compile(r"[1-9][0-9]{0,17}( [1-9][0-9]{0,17})+")


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The items of U users, oldest first, user after user.

    Attributes:
        items: Numbers of items, in [1, num_items].
        lengths: Items per user.
        users: What each user is called where the data come from.
        num_items: The largest number an item may have; tables need a row more, for 0.
        item_names: What item i is called where the data come from, at place i - 1.
    """

    items: Int64[np.ndarray, " events"]
    lengths: Int64[np.ndarray, " users"]
    users: np.ndarray
    num_items: int
    item_names: np.ndarray

    def __len__(self) -> int:
        """Give U."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> Int64[np.ndarray, " users"]:
        """Where each user's items begin."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    def take(
        self,
        rows: Int64[np.ndarray, " rows"],
        *,
        skip_last: int = 0,
        max_length: int | None = None,
    ) -> "Sequences":
        """Copy the sequences of some users, or the latest items of them.

        Args:
            rows: Which users, by their place.
            skip_last: How many of the latest items to leave out.
            max_length: How many of the latest of the others to keep; by default all.
        """
        stops = self.starts[rows] + np.maximum(self.lengths[rows] - skip_last, 0)
        lengths = stops - self.starts[rows]
        lengths = lengths if max_length is None else np.minimum(lengths, max_length)
        return Sequences(
            items=self.items[concatenated_ranges(stops - lengths, lengths)],
            lengths=lengths,
            users=self.users[rows],
            num_items=self.num_items,
            item_names=self.item_names,
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Users whose next item is to be foretold.

    Attributes:
        histories: What each user took before.
        targets: The item that each took next.
    """

    histories: Sequences
    targets: Int64[np.ndarray, " users"]


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Sequences in three parts.

    Attributes:
        train: All but the last two items of each user.
        validation: The last item but one, after those of `train`.
        test: The last item, after all others.
    """

    train: Sequences
    validation: HeldOut
    test: HeldOut


def leave_one_out(sequences: Sequences) -> LeaveOneOut:
    """Hold out the last two items of each user.

    Users with fewer than three items are in no part but `train`, which has all of theirs.
    """
    every = np.arange(len(sequences))
    is_held_out = sequences.lengths >= 3
    rows = every[is_held_out]
    last = sequences.starts[rows] + sequences.lengths[rows] - 1
    parts = {
        name: HeldOut(
            histories=sequences.take(rows, skip_last=back), targets=sequences.items[last - back + 1]
        )
        for name, back in {"validation": 2, "test": 1}.items()
    }
    trained = np.where(is_held_out, sequences.lengths - 2, sequences.lengths)
    train = Sequences(
        items=sequences.items[concatenated_ranges(sequences.starts, trained)],
        lengths=trained,
        users=sequences.users,
        num_items=sequences.num_items,
        item_names=sequences.item_names,
    )
    return LeaveOneOut(train=train, **parts)


@runtime_checkable
class Table(Protocol):
    """Columns by name: a dict of arrays, a polars DataFrame, or the like."""

    def __getitem__(self, name: str, /) -> Any:
        """Give a column."""


def build_sequences(
    table: Table,
    *,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    min_per_user: int = 1,
    min_per_item: int = 1,
) -> Sequences:
    """Order the events of each user by time.

    Events at one moment stay in the order of the table. Users and items are numbered in ascending
    order of what they are called.

    Args:
        table: Columns by name: a polars DataFrame, or a dict of arrays.
        user: The column that says who; numbers or text.
        item: The column that says what; numbers or text.
        time: The column that says when; numbers or dates.
        min_per_user: Users with fewer events are left out,
        min_per_item: and items with fewer, again and again until all that are left have enough.

    Raises:
        KeyError: The table lacks a column; a DataFrame raises an error of its own.
        ValueError: Columns differ in length or hold missing values, or no event is left.
    """
    users, items, times = (_column(table, name) for name in (user, item, time))
    if not len(users) == len(items) == len(times):
        raise ValueError(
            f"build_sequences: {len(users)} of {user!r}, {len(items)} of {item!r} and {len(times)} "
            f"of {time!r}; give as many of each"
        )
    kept = _keep_frequent(users, items, min_per_user, min_per_item)
    if not kept.any():
        raise ValueError(
            f"build_sequences: of {len(users)} events none is left with {min_per_user} per user "
            f"and {min_per_item} per item; ask for less"
        )
    user_names, user_numbers = np.unique(users[kept], return_inverse=True)
    item_names, item_numbers = np.unique(items[kept], return_inverse=True)
    order = np.lexsort((times[kept], user_numbers))
    return Sequences(
        items=item_numbers[order] + 1,
        lengths=np.bincount(user_numbers),
        users=user_names,
        num_items=len(item_names),
        item_names=item_names,
    )


def _column(table: Table, name: str) -> np.ndarray:
    column = np.asarray(table[name])
    if column.dtype == object:  # text, as polars gives it; None would not sort
        missing = np.array([value is None for value in column], bool)
        column = column if missing.any() else column.astype(np.str_)
    else:
        missing = np.isnat(column) if column.dtype.kind in "mM" else column != column
    if missing.any():
        raise ValueError(
            f"build_sequences: column {name!r} lacks a value in row {int(missing.argmax())}; fill "
            "it in or leave the row out"
        )
    return column


def _keep_frequent(
    users: np.ndarray, items: np.ndarray, min_per_user: int, min_per_item: int
) -> Bool[np.ndarray, " events"]:
    """Choose the events whose user and item have enough of the events chosen."""
    sides = []
    for names, least in ((users, min_per_user), (items, min_per_item)):
        sides.append((np.unique(names, return_inverse=True)[1], least))
    kept = np.ones(len(users), bool)
    num_before = len(users) + 1
    while kept.sum() < num_before:
        num_before = kept.sum()
        for numbers, least in sides:
            kept &= np.bincount(numbers[kept], minlength=len(numbers))[numbers] >= least
    return kept


def read_sequences(path: str | Path | None = None, *, name: str = "Beauty") -> Sequences:
    """Read a file with a user a line: "user item item …", oldest first, as S3-Rec's are.

    Users and items are numbers from 1; those of the file are kept.

    Args:
        path: The file; by default `s3rec/NAME.txt` in the data folder.
        name: Of the set, used when `path` is not given.

    Raises:
        FileNotFoundError: There is no such file; the message says what to fetch from where.
        ValueError: The file is empty or cut off, a line is anything else, or a user comes twice.
    """
    found = find_file(path, default=f"s3rec/{name}.txt", fetch=S3REC_FETCH)
    text = found.read_bytes().decode("latin-1")
    if not text.endswith("\n"):
        raise ValueError(
            f"{found}: {'ends in mid-line, wanted a newline' if text else 'the file is empty'}; "
            "fetch it again"
        )
    rows = []
    seen: dict[int, int] = {}
    for number, line in enumerate(text[:-1].split("\n"), start=1):
        line = line.removesuffix("\r")
        if not _LINE.fullmatch(line):
            raise ValueError(
                f"{found}: line {number}: found {line[:60]!r}, wanted a user and at least one "
                "item, numbers from 1 with one blank between"
            )
        row = np.fromstring(line, np.int64, sep=" ")
        first = seen.setdefault(int(row[0]), number)
        if first != number:
            raise ValueError(f"{found}: line {number}: user {row[0]} was in line {first} already")
        rows.append(row)
    items = np.concatenate([row[1:] for row in rows])
    return Sequences(
        items=items,
        lengths=np.array([len(row) - 1 for row in rows]),
        users=np.array([row[0] for row in rows]),
        num_items=int(items.max()),
        item_names=np.arange(1, int(items.max()) + 1),
    )
