"""What a line of Criteo's click logs holds, taken in a block at a time.

A line is a label, 13 integers and 26 hexadecimal ids, separated by tabs; an empty field is a
missing value. A file for a contest's submission has no labels. polars parses; whatever it might
take more kindly than this module says (a short line, a sign before an id) is looked for in the
bytes. Only of a block with a fault are the lines gone through in plain Python.
"""

import functools
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkProcess

import numpy as np
from jaxtyping import Int64

INT_FEATURE_COUNT = 13
CAT_FEATURE_COUNT = 26
DAYS = 24
"""The files of the terabyte set, one a day."""

DEFAULT_LABEL_NAME = "label"
DEFAULT_INT_NAMES: list[str] = [f"int_{i}" for i in range(INT_FEATURE_COUNT)]
DEFAULT_CAT_NAMES: list[str] = [f"cat_{i}" for i in range(CAT_FEATURE_COUNT)]

NO_LABEL = -1
"""The label of every row of a file without labels."""

_NAMES = [DEFAULT_LABEL_NAME, *DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]
INT_LOW, INT_HIGH = -(2**31), 2**31 - 1
CAT_HIGH = 2**32 - 1
_IS_EXPECTED = np.isin(np.arange(256), list(b"0123456789abcdefABCDEF-\t\n"))
_TAB, _NEWLINE, _MINUS = b"\t\n-"
# Leading zeros are kept from int(), which refuses thousands of digits.
_INTEGER = re.compile(r"(-?)0*([0-9]{1,10})")
_HEXADECIMAL = re.compile(r"0*[0-9a-fA-F]{1,8}")


@dataclass(frozen=True, kw_only=True)
class CriteoRows:
    """Consecutive rows, as columns; a missing number or id is 0.

    Attributes:
        labels: 1 for a click, 0 for none, -1 in a file without labels.
        dense: The 13 integers.
        sparse: The 26 ids, in [0, 2**32).
    """

    labels: Int64[np.ndarray, " rows"]
    dense: Int64[np.ndarray, "rows 13"]
    sparse: Int64[np.ndarray, "rows 26"]

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.labels)


def parse_lines(text: bytes, *, has_labels: bool) -> CriteoRows | None:
    """Parse whole lines; None where one of them has a fault.

    Args:
        text: Lines, each ending in a newline.
        has_labels: Whether lines begin with a label.

    Raises:
        RuntimeError: This process was forked from one that has loaded polars.
    """
    _check_threads_survive(os.getpid())
    import polars  # an extra, and slow to import

    if not _is_well_formed(np.frombuffer(text, np.uint8), has_labels):
        return None
    names = _NAMES if has_labels else _NAMES[1:]
    kinds = {name: polars.String if name in DEFAULT_CAT_NAMES else polars.Int64 for name in names}
    try:
        frame = polars.read_csv(
            io.BytesIO(text), has_header=False, separator="\t", quote_char=None, schema=kinds
        )
        ids = frame.select(
            polars.col(DEFAULT_CAT_NAMES).str.to_integer(base=16, dtype=polars.Int64)
        )
    except polars.exceptions.PolarsError:
        return None
    labels = frame[DEFAULT_LABEL_NAME].fill_null(NO_LABEL).to_numpy() if has_labels else None
    dense = frame.select(DEFAULT_INT_NAMES).fill_null(0).to_numpy()
    sparse = ids.fill_null(0).to_numpy()
    if len(frame) and not (
        (labels is None or (labels.min() >= 0 and labels.max() <= 1))
        and (dense.min() >= INT_LOW and dense.max() <= INT_HIGH)
        and sparse.max() <= CAT_HIGH
    ):
        return None
    labels = np.full(len(frame), NO_LABEL) if labels is None else labels
    return CriteoRows(labels=labels, dense=dense, sparse=sparse)


@functools.cache
def _check_threads_survive(process_id: int) -> None:
    """Refuse, once per process, what would wait forever for threads that a fork leaves behind."""
    is_forked = isinstance(multiprocessing.current_process(), ForkProcess)
    if is_forked and "polars" in sys.modules:
        raise RuntimeError(
            f"process {process_id} was forked from one that has loaded polars, which then cannot "
            "run; give DataLoader multiprocessing_context='spawn' or 'forkserver'"
        )


def _is_well_formed(text: np.ndarray, has_labels: bool) -> bool:
    """Tell whether every line has all its fields, of the right characters, ids without a sign."""
    num_fields = len(_NAMES) - (not has_labels)
    if not _IS_EXPECTED[text].all():
        return False
    ends = np.flatnonzero((text == _TAB) | (text == _NEWLINE))
    if len(ends) % num_fields:
        return False
    is_newline = (text[ends] == _NEWLINE).reshape(-1, num_fields)
    signed_fields = np.searchsorted(ends, np.flatnonzero(text == _MINUS)) % num_fields
    return bool(
        is_newline[:, -1].all()
        and is_newline.sum() == len(is_newline)
        and (signed_fields < num_fields - CAT_FEATURE_COUNT).all()
    )


def split_faulty(text: bytes, *, has_labels: bool) -> Iterator[tuple[bytes, str]]:
    """Go through lines one by one.

    Args:
        text: Lines, each ending in a newline.
        has_labels: Whether lines begin with a label.

    Yields:
        Each line with its newline, and what is wrong with it; empty if nothing is.
    """
    for line in text.split(b"\n")[:-1]:
        yield line + b"\n", _line_fault(line, has_labels)


def _line_fault(line: bytes, has_labels: bool) -> str:
    fields = line.decode("latin-1").split("\t")
    names = _NAMES if has_labels else _NAMES[1:]
    if len(fields) != len(names):
        other = {len(_NAMES): True, len(_NAMES) - 1: False}.get(len(fields))
        hint = "" if other is None else f"; a file of such lines is read with has_labels={other}"
        return f"found {len(fields)} fields, {_show(line)}, wanted {len(names)}{hint}"
    for name, field in zip(names, fields, strict=True):
        if wanted := _wanted(name, field):
            return f"{name} is {_show(field.encode('latin-1'))}, wanted {wanted}"
    return ""


def _wanted(name: str, field: str) -> str:
    """Say what a field should have been, or nothing if it is that."""
    if name == DEFAULT_LABEL_NAME:
        return "" if _is_integer(field, 0, 1) else "0 or 1"
    if not field:
        return ""
    if name in DEFAULT_CAT_NAMES:
        return (
            ""
            if _HEXADECIMAL.fullmatch(field)
            else f"a hexadecimal number up to {CAT_HIGH:x}, or nothing"
        )
    if _is_integer(field, INT_LOW, INT_HIGH):
        return ""
    return f"an integer from {INT_LOW} to {INT_HIGH}, or nothing"


def _is_integer(field: str, low: int, high: int) -> bool:
    found = _INTEGER.fullmatch(field)
    return found is not None and low <= int(found[1] + found[2]) <= high


def _show(text: bytes) -> str:
    return repr(text[:60].decode("latin-1")) + ("..." if len(text) > 60 else "")
