"""Read a small delimited text file into columns, and say exactly where it is damaged.

polars parses; only when it stumbles, or a value is missing or out of range, a slower pass in plain
Python finds the line to name.
"""

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_UNIT_SEPARATOR = "\x1f"  # occurs in no text file, so it can stand for a longer separator


@dataclass(frozen=True, kw_only=True)
class Column:
    """One field of each line.

    Attributes:
        name: What the field is called, also in the header.
        kind: `int`, `float` or `str`.
        low: The least value that is right; of numbers only.
        high: The greatest value that is right; of numbers only.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    low: float = 0.0
    high: float = 2.0**62

    def fault(self, field: str) -> str | None:
        """Say what is wrong with a field, or nothing."""
        if self.kind is str:
            return None
        wanted = f"{self.kind.__name__} from {self.low:g} to {self.high:g}"
        try:
            is_right = self.low <= (int if self.kind is int else float)(field) <= self.high
        except ValueError:
            is_right = False
        return None if is_right else f"{self.name} is {field!r}, wanted {wanted}"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How the lines of a file are written.

    Attributes:
        separator: What stands between fields.
        has_header: Whether the first line holds the names of the columns.
        quotes: Whether a field may stand in double quotes.
        encoding: Of the bytes.
    """

    separator: str = ","
    has_header: bool = True
    quotes: bool = True
    encoding: str = "utf-8"


def read_columns(
    path: Path, columns: tuple[Column, ...], dialect: Dialect
) -> dict[str, np.ndarray]:
    """Read a file whole; one ending in `.gz` is unpacked on the way.

    Args:
        path: The file. It must end with a newline, or it is taken to be cut off.
        columns: The fields of every line, in order.
        dialect: How the lines are written.

    Returns:
        A column by name: int64, float64 or strings (object).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, cut off, or has a wrong line.
    """
    text = _read_text(path, dialect)
    names = dialect.separator.join(column.name for column in columns)
    if dialect.has_header:
        header, _, body = text.partition("\n")
        if header.strip() != names:
            raise ValueError(f"{path}: line 1: the header is {header.strip()!r}, wanted {names!r}")
    else:
        body = text
    if not body.strip():
        raise ValueError(f"{path}: no line after the header, wanted lines of {names!r}")
    parsed = _parse(body, columns, dialect)
    if parsed is None or not _all_in_range(parsed, columns):
        raise ValueError(f"{path}: {_first_fault(body, columns, dialect)}")
    return parsed


def _read_text(path: Path, dialect: Dialect) -> str:
    """Read and decode, with the separator narrowed to one character."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = raw.decode(dialect.encoding)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cut off or not gzip ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: line {line}: found byte {raw[error.start]:#x}, wanted {dialect.encoding} text"
        ) from error
    if not text:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    if not text.endswith("\n"):
        tail, line = text[text.rfind("\n") + 1 :], text.count("\n") + 1
        raise ValueError(
            f"{path}: line {line}: the file ends in mid-line, after {tail[-60:]!r}, "
            "wanted a newline; fetch it again"
        )
    return text.replace(dialect.separator, _one_character(dialect))


def _one_character(dialect: Dialect) -> str:
    return dialect.separator if len(dialect.separator) == 1 else _UNIT_SEPARATOR


def _parse(
    text: str, columns: tuple[Column, ...], dialect: Dialect
) -> dict[str, np.ndarray] | None:
    """Parse with polars; None where it sees a fault."""
    import polars  # an extra, and slow to import

    kinds = {int: polars.Int64, float: polars.Float64, str: polars.String}
    try:
        frame = polars.read_csv(
            io.BytesIO(text.encode()),
            has_header=False,
            separator=_one_character(dialect),
            quote_char='"' if dialect.quotes else None,
            schema={column.name: kinds[column.kind] for column in columns},
        )
    except polars.exceptions.PolarsError:
        return None
    # polars fills short lines with nulls; an empty text is null as well, and that one is right.
    if frame.null_count().sum_horizontal().item() and _first_fault(text, columns, dialect):
        return None
    texts = [column.name for column in columns if column.kind is str]
    frame = frame.with_columns(polars.col(texts).fill_null(""))
    return {name: frame[name].to_numpy() for name in frame.columns}


def _all_in_range(parsed: dict[str, np.ndarray], columns: tuple[Column, ...]) -> bool:
    return all(
        bool(((parsed[column.name] >= column.low) & (parsed[column.name] <= column.high)).all())
        for column in columns
        if column.kind is not str
    )


def _first_fault(text: str, columns: tuple[Column, ...], dialect: Dialect) -> str:
    """Walk the lines after the header and describe the first wrong one; empty if all are right."""
    names = dialect.separator.join(column.name for column in columns)
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=_one_character(dialect),
        quoting=csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for row in rows:
            line = rows.line_num + int(dialect.has_header)
            if len(row) != len(columns):
                found = dialect.separator.join(row)
                wanted = f"wanted {len(columns)}: {names!r}"
                return f"line {line}: found {len(row)} fields, {found!r}, {wanted}"
            for column, field in zip(columns, row, strict=True):
                if fault := column.fault(field):
                    return f"line {line}: {fault}"
    except csv.Error as error:
        return f"line {rows.line_num + int(dialect.has_header)}: {error}, wanted {names!r}"
    return ""
