"""Read Criteo's click logs, the Kaggle and the terabyte set, from the files as they are published.

`CriteoReader` gives columns, at the speed of polars, block by block; files larger than memory are
no matter. `criteo_kaggle` and `criteo_terabyte` give one row after the other. What is made of them
is left to `criteo_samples` (to train on raw rows), `criteo_npy` and `criteo_batches` (to train on
preprocessed days).

Source: Criteo's display advertising challenge (Kaggle, 2014) and terabyte click logs. Needs polars
(the `train` extra), imported at the first read.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data.criteo_fields import (
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    DEFAULT_LABEL_NAME,
    CriteoRows,
    parse_lines,
    split_faulty,
)
from shardwise.data.criteo_lines import Block, Place, read_blocks
from shardwise.data.folders import find_file
from shardwise.data.position import check_units

FETCH = (
    "get the click logs from https://ailab.criteo.com/ressources/ (the Kaggle set's train.txt, or "
    "the terabyte set's day_0.gz to day_23.gz)"
)

Fields = list[str]

_START = (0, Place())
"""Number of a file, place in it."""

_ROW_NAMES = [DEFAULT_LABEL_NAME, *DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]


class CriteoReader:
    """The rows of some files, in blocks of columns.

    Iterating again reads again. Under `DataLoader(reader, batch_size=None)` workers share the
    blocks out. `state_dict` gives the position, in bytes and lines; going on from there does not
    read again what came before, but a gzipped file is unpacked up to it. It moves where
    files are read: under such workers, in their copies only.

    Args:
        paths: The files, one after the other; those ending in `.gz` are unpacked on the way.
        has_labels: Whether lines begin with a label, which those of a test file do not.
        on_bad_lines: At a line with a fault "raise", or "skip" it and count it.
        block_bytes: About how much is read at once.
        max_line_bytes: An unfinished line longer than this is a fault; memory is bounded by it and
            `block_bytes`.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: `on_bad_lines` is neither, or a size is under 1. When iterating: a file is empty
            or not whole, or a line has a fault and none may be skipped; the message names the
            file, the line, what was found and what is wanted.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        *,
        has_labels: bool = True,
        on_bad_lines: Literal["raise", "skip"] = "raise",
        block_bytes: int = 2**21,
        max_line_bytes: int = 2**16,
    ) -> None:
        if on_bad_lines not in ("raise", "skip"):
            raise ValueError(f"CriteoReader: on_bad_lines is {on_bad_lines!r}; 'raise' or 'skip'")
        if min(block_bytes, max_line_bytes) < 1:
            raise ValueError(
                f"CriteoReader: block_bytes {block_bytes}, max_line_bytes {max_line_bytes}; each "
                "must be at least 1"
            )
        self.paths = [find_file(path, default="", fetch=FETCH) for path in paths]
        self.has_labels = has_labels
        self.on_bad_lines = on_bad_lines
        self.block_bytes = block_bytes
        self.max_line_bytes = max_line_bytes
        self.num_skipped = 0
        self.first_skipped = ""
        self._begin = self._next = _START

    def __iter__(self) -> Iterator[CriteoRows]:
        """Give the rows of one block after the other.

        `num_skipped` and `first_skipped` tell, of the latest iteration, how many lines were
        skipped and what was wrong with the first.
        """
        return (rows for _, rows in self.blocks())

    def blocks(self) -> Iterator[tuple[bytes, CriteoRows]]:
        """Give the good lines of one block after the other, as text and as columns."""
        self._next, self._begin = self._begin, _START
        if self._next == _START:
            self.num_skipped, self.first_skipped = 0, ""
        return self._blocks(*self._next)

    def _blocks(self, first: int, start: Place) -> Iterator[tuple[bytes, CriteoRows]]:
        worker = get_worker_info()
        share, num_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = 0
        for file, path in enumerate(self.paths[first:], first):
            for block in read_blocks(
                path,
                block_bytes=self.block_bytes,
                max_line_bytes=self.max_line_bytes,
                start=start if file == first else Place(),
            ):
                number += 1
                if number % num_shares != share:
                    continue
                text, rows = self._parse(path, block)
                self._next = (file, block.end)
                if len(rows):
                    yield text, rows

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the latest iteration, and what was skipped up to it."""
        file, place = self._next
        skipped = {"num_skipped": self.num_skipped, "first_skipped": self.first_skipped}
        return self._units() | skipped | {"file": file, "byte": place.byte, "line": place.line}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; the ones after it begin at the start.

        Raises:
            ValueError: It was saved with other files, or blocks of another size.
        """
        check_units("CriteoReader", state, self._units())
        self._begin = self._next = (state["file"], Place(state["byte"], state["line"]))
        self.num_skipped, self.first_skipped = state["num_skipped"], state["first_skipped"]

    def _units(self) -> dict[str, Any]:
        sizes = {"block_bytes": self.block_bytes, "has_labels": self.has_labels}
        return {"files": [path.name for path in self.paths]} | sizes

    def _parse(self, path: Path, block: Block) -> tuple[bytes, CriteoRows]:
        rows = None if block.fault else parse_lines(block.text, has_labels=self.has_labels)
        if rows is not None:
            return block.text, rows
        lines = split_faulty(block.text, has_labels=self.has_labels)
        good = []
        for number, (line, fault) in enumerate(lines, start=block.first_line):
            if fault:
                self._skip(path, number, fault)
            else:
                good.append(line)
        if block.fault:
            self._skip(path, block.first_line, block.fault)
        text = b"".join(good)
        rows = parse_lines(text, has_labels=self.has_labels)
        assert rows is not None, f"{path}: lines from {block.first_line}: the two parsers differ"
        return text, rows

    def _skip(self, path: Path, line: int, fault: str) -> None:
        message = f"{path}: line {line}: {fault}"
        if self.on_bad_lines == "raise":
            raise ValueError(message)
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or message


def row_to_dict(fields: Fields) -> dict[str, int]:
    """Give the numbers of one row by name; a missing one is 0, a missing label column -1.

    Args:
        fields: The 40 fields as text, or the 39 of a row without label.
    """
    numbers = [int(field or "0") for field in fields[: -len(DEFAULT_CAT_NAMES)]]
    numbers += [int(field or "0", base=16) for field in fields[-len(DEFAULT_CAT_NAMES) :]]
    return dict(zip(_ROW_NAMES, [-1] * (len(_ROW_NAMES) - len(numbers)) + numbers, strict=True))


class CriteoRowDataset(IterableDataset[Any]):
    """The rows of a reader one at a time, each turned into what `row_mapper` makes of it.

    Args:
        reader: What to read.
        row_mapper: Called with the fields of a row as text. By default a row is a dict of numbers
            by the names `label`, `int_0` … `int_12`, `cat_0` … `cat_25`; with None, the list of
            its fields.

    Attributes:
        reader: Tells how many lines were skipped (in this process, not in workers).
    """

    def __init__(
        self, reader: CriteoReader, row_mapper: Callable[[Fields], Any] | None = row_to_dict
    ) -> None:
        super().__init__()
        self.reader = reader
        self.row_mapper = row_mapper
        self._position: dict[str, Any] = {}
        self._passed = 0

    def __iter__(self) -> Iterator[Any]:
        """Read the files from the start."""
        passed, self._passed = self._passed, 0
        blocks = self.reader.blocks()
        before = self.reader.state_dict()
        for text, rows in blocks:
            for number, row in enumerate(islice(self._map(text, rows), passed, None), passed + 1):
                self._position = before | {"row": number}
                yield row
            before, passed = self.reader.state_dict(), 0

    def _map(self, text: bytes, rows: CriteoRows) -> Iterator[Any]:
        if self.row_mapper is row_to_dict:
            return _dicts(rows)
        fields = (line.split("\t") for line in text.decode("ascii").split("\n")[:-1])
        return fields if self.row_mapper is None else map(self.row_mapper, fields)

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the latest iteration: that of a block and how many of its rows."""
        return self._position or self.reader.state_dict() | {"row": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; the ones after it begin at the start.

        Raises:
            ValueError: It was saved with other files, or blocks of another size.
        """
        self.reader.load_state_dict(state)
        self._position, self._passed = state, state["row"]


def _dicts(rows: CriteoRows) -> Iterator[dict[str, int]]:
    """As `row_to_dict`, from columns."""
    numbers = (rows.labels[:, None], rows.dense, rows.sparse)
    columns = [column.tolist() for part in numbers for column in part.T]
    return (dict(zip(_ROW_NAMES, row, strict=True)) for row in zip(*columns, strict=True))


def criteo_kaggle(
    path: str | Path,
    *,
    row_mapper: Callable[[Fields], Any] | None = row_to_dict,
    has_labels: bool = True,
    on_bad_lines: Literal["raise", "skip"] = "raise",
) -> Iterable[Any]:
    """Give the rows of a file of the Kaggle set, one at a time, as a `CriteoRowDataset`.

    Args:
        path: `train.txt`, or with `has_labels=False` `test.txt`.
        row_mapper: As of `CriteoRowDataset`.
        has_labels: As of `CriteoReader`.
        on_bad_lines: As of `CriteoReader`.
    """
    return criteo_terabyte(
        [path], row_mapper=row_mapper, has_labels=has_labels, on_bad_lines=on_bad_lines
    )


def criteo_terabyte(
    paths: Iterable[str | Path],
    *,
    row_mapper: Callable[[Fields], Any] | None = row_to_dict,
    has_labels: bool = True,
    on_bad_lines: Literal["raise", "skip"] = "raise",
) -> Iterable[Any]:
    """Give the rows of some days of the terabyte set, one at a time, as a `CriteoRowDataset`.

    Args:
        paths: The days, gzipped or not.
        row_mapper: As of `CriteoRowDataset`.
        has_labels: As of `CriteoReader`.
        on_bad_lines: As of `CriteoReader`.
    """
    reader = CriteoReader(paths, has_labels=has_labels, on_bad_lines=on_bad_lines)
    return CriteoRowDataset(reader, row_mapper)
