"""Number the ids of Criteo's sparse columns without gaps, over all days at once.

Reads everything twice, in blocks: once to count, once to translate. What is held in memory is, per
column and distinct id, 24 bytes.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, Int64

from shardwise.data.criteo_fields import CAT_FEATURE_COUNT
from shardwise.data.criteo_paths import PATH_MANAGER_KEY, check_path_manager
from shardwise.data.npy import NpyWriter, open_matrix, row_blocks

FREQUENCY_THRESHOLD = 3

_RARE, _FIRST = 1, 2
_NONE = np.empty(0, np.int64)


def sparse_to_contiguous(
    in_files: Sequence[str | Path],
    output_dir: str | Path,
    frequency_threshold: int = FREQUENCY_THRESHOLD,
    columns: int = CAT_FEATURE_COUNT,
    path_manager_key: str = PATH_MANAGER_KEY,
    output_file_suffix: str = "_contig_freq.npy",
) -> None:
    """Write files in which each column's ids are 2, 3, … by first appearance, as int32.

    Counts, and so numbers, are per column and joint over all files. 0 is not used.

    Args:
        in_files: Matrices of ids, in order.
        output_dir: Where `NAME.npy` becomes `NAME` and the suffix.
        frequency_threshold: Ids seen less often than this become 1.
        columns: Of each file.
        path_manager_key: As of `BinaryCriteoUtils`.
        output_file_suffix: What the names of the files written end in.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: A file has another number of columns or no integers, or two have one name.
    """
    check_path_manager(path_manager_key)
    matrices = [open_matrix(path) for path in in_files]
    outputs = [Path(output_dir) / (Path(path).stem + output_file_suffix) for path in in_files]
    for path, matrix in zip(in_files, matrices, strict=True):
        if matrix.shape[1] != columns or matrix.dtype.kind != "i":
            raise ValueError(
                f"{path}: {matrix.shape[1]} columns of {matrix.dtype}, wanted {columns} of integers"
            )
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"sparse_to_contiguous: {list(in_files)} hold one name twice")
    counters = [_Counter() for _ in range(columns)]
    for matrix in matrices:
        for block in row_blocks(matrix):
            for counter, ids in zip(counters, block.T, strict=True):
                counter.add(ids)
    numbers = [counter.number(frequency_threshold) for counter in counters]
    with ExitStack() as stack:
        writers = [stack.enter_context(NpyWriter(path, columns, np.int32)) for path in outputs]
        for matrix, writer in zip(matrices, writers, strict=True):
            for block in row_blocks(matrix):
                writer.append(_translate(block, numbers))


_Table = tuple[Int64[np.ndarray, "..."], Int64[np.ndarray, "..."], Int64[np.ndarray, "..."]]
"""Sorted ids, where each was first seen, and how often."""


class _Counter:
    """Counts ids and remembers where each was first seen.

    Tables are kept sorted by id and merged when of like size, as in merge sort.
    """

    def __init__(self) -> None:
        self._tables: list[_Table] = []
        self._num_seen = 0

    def add(self, ids: Int[np.ndarray, " rows"]) -> None:
        found, first, counts = np.unique(
            ids.astype(np.int64), return_index=True, return_counts=True
        )
        self._tables.append((found, first + self._num_seen, counts))
        self._num_seen += len(ids)
        while len(self._tables) > 1 and len(self._tables[-2][0]) <= 2 * len(self._tables[-1][0]):
            later = self._tables.pop()
            self._tables.append(_merge([self._tables.pop(), later]))

    def number(self, threshold: int) -> tuple[Int64[np.ndarray, " ids"], Int32[np.ndarray, " ids"]]:
        """Give the sorted ids and the new number of each."""
        ids, first, counts = _merge([(_NONE, _NONE, _NONE), *self._tables])
        numbers = np.full(len(ids), _RARE, np.int32)
        kept = np.flatnonzero(counts >= threshold)
        numbers[kept[np.argsort(first[kept])]] = np.arange(_FIRST, _FIRST + len(kept))
        return ids, numbers


def _merge(tables: list[_Table]) -> _Table:
    """Join tables, the earlier ones first."""
    ids, first, counts = (np.concatenate(part) for part in zip(*tables, strict=True))
    order = np.argsort(ids, kind="stable")
    ids, first, counts = ids[order], first[order], counts[order]
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    return ids[starts], first[starts], np.add.reduceat(counts, starts)


def _translate(
    block: Int[np.ndarray, "rows sparse"],
    numbers: list[tuple[Int64[np.ndarray, "..."], Int32[np.ndarray, "..."]]],
) -> Int32[np.ndarray, "rows sparse"]:
    columns = [
        new[np.searchsorted(ids, old)] for old, (ids, new) in zip(block.T, numbers, strict=True)
    ]
    return np.stack(columns, axis=1)
