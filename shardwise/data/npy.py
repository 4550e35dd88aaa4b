"""Matrices in `.npy` files that may be larger than memory: written part by part, read in blocks."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

BLOCK_ROWS = 2**18
"""How many rows are held at once."""


class NpyWriter:
    """Write a matrix some rows at a time, in a `with` block.

    The file appears, whole, at the end of the block; if the block fails, nothing is left of it.

    Args:
        path: The file.
        num_columns: Of the matrix.
        dtype: Of its numbers, to which what is appended is cast.
    """

    def __init__(self, path: str | Path, num_columns: int, dtype: Any) -> None:
        self.path = Path(path)
        self.num_columns = num_columns
        self.dtype = np.dtype(dtype)
        self.num_rows = 0
        self._part = self.path.with_name(self.path.name + ".part")

    def __enter__(self) -> "NpyWriter":
        """Begin the file under another name."""
        self._file = self._part.open("wb")
        self._header_bytes = self._write_header()
        return self

    def append(self, rows: np.ndarray) -> None:
        """Write the rows that follow, [rows, num_columns]."""
        assert rows.shape[1:] == (self.num_columns,), f"{self.path}: rows of shape {rows.shape}"
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self.num_rows += len(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the number of rows and give the file its name."""
        self._file.seek(0)
        # numpy leaves room for the first axis to grow, so that the header's length stays.
        assert self._write_header() == self._header_bytes, f"{self.path}: the header has grown"
        self._file.close()
        if error is None:
            self._part.replace(self.path)
        else:
            self._part.unlink()

    def _write_header(self) -> int:
        npy_format.write_array_header_1_0(
            self._file,
            {
                "descr": npy_format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.num_rows, self.num_columns),
            },
        )
        return self._file.tell()


def open_matrix(path: str | Path) -> np.ndarray:
    """Map a matrix into memory; its rows are read when they are looked at.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no `.npy` file or shorter than its header says, or it holds no matrix of
            numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it by BinaryCriteoUtils.tsv_to_npys")
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cut off or not npy ({error}); make it again") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "if":
        raise ValueError(f"{path}: wanted a matrix of integers or floats in npy format")
    return matrix


def row_blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Give a matrix's rows, some of them at a time."""
    return (matrix[start : start + BLOCK_ROWS] for start in range(0, len(matrix), BLOCK_ROWS))
