"""Shuffle the rows of Criteo's training days over all of them, in bounded memory."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Int32

from shardwise.data.criteo_fields import CAT_FEATURE_COUNT, DAYS, INT_FEATURE_COUNT
from shardwise.data.criteo_paths import PATH_MANAGER_KEY, check_path_manager
from shardwise.data.npy import NpyWriter, open_matrix, row_blocks

BUCKET_ROWS = 2**24
"""About how many rows are shuffled in memory at once: 2.7 GB, twice."""

_PARTS = {"labels": np.int32, "dense": np.float32, "sparse": np.int32}


def shuffle(  # noqa: PLR0913  # the parameters of the field's vocabulary
    input_dir_labels_and_dense: str | Path,
    input_dir_sparse: str | Path,
    output_dir_shuffled: str | Path,
    rows_per_day: Mapping[int, int],
    output_dir_full_set: str | Path | None = None,
    days: int = DAYS,
    int_columns: int = INT_FEATURE_COUNT,
    sparse_columns: int = CAT_FEATURE_COUNT,
    path_manager_key: str = PATH_MANAGER_KEY,
    random_seed: int = 0,
) -> None:
    """Write the rows of all days but the last in a random order; the last day is copied as it is.

    Every order is equally likely. Up to `BUCKET_ROWS` rows it is numpy's permutation by the seed;
    more rows are first dealt at random to files small enough to be shuffled in memory.

    Args:
        input_dir_labels_and_dense: Holds `day_D_labels.npy` and `day_D_dense.npy`.
        input_dir_sparse: Holds `day_D_sparse_contig_freq.npy`, ids under 2**31.
        output_dir_shuffled: Gets `day_D_labels.npy`, `day_D_dense.npy` and `day_D_sparse.npy`.
        rows_per_day: Rows of each day by its number, as they are and as they will be.
        output_dir_full_set: Gets `labels.npy`, `dense.npy` and `sparse.npy`, the shuffled days one
            after the other, if given.
        days: How many there are, the last included.
        int_columns: Dense columns.
        sparse_columns: Sparse columns.
        path_manager_key: As of `BinaryCriteoUtils`.
        random_seed: Of the order.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: A file has other rows or columns than were given, or an id of 2**31 or more.
    """
    check_path_manager(path_manager_key)
    widths = {"labels": 1, "dense": int_columns, "sparse": sparse_columns}
    folders = dict.fromkeys(("labels", "dense"), Path(input_dir_labels_and_dense))
    folders["sparse"] = Path(input_dir_sparse)
    sources = [_open_day(folders, day, widths) for day in range(days)]
    sizes = [len(source["labels"]) for source in sources]
    for day, size in enumerate(sizes):
        # The last day, which is only copied, need not be listed.
        if rows_per_day.get(day, size if day == days - 1 else None) != size:
            raise ValueError(
                f"shuffle: day {day} has {size} rows, rows_per_day says {rows_per_day.get(day)}"
            )
    output = Path(output_dir_shuffled)
    with ExitStack() as stack:
        by_day = [_writers(stack, output, f"day_{day}_", widths) for day in range(days)]
        full = {}
        if output_dir_full_set is not None:
            full = _writers(stack, Path(output_dir_full_set), "", widths)
        done = 0
        blocks = (block for source in sources[:-1] for block in _pack(source))
        for rows in _in_random_order(blocks, sum(sizes[:-1]), random_seed, output):
            _append(full, rows, widths)
            ends = np.cumsum([0, *sizes[:-1]]) - done
            for writers, start, end in zip(by_day, ends, ends[1:], strict=False):
                _append(writers, rows[max(start, 0) : max(end, 0)], widths)
            done += len(rows)
        for rows in _pack(sources[-1]):
            _append(by_day[-1], rows, widths)


def _open_day(
    folders: Mapping[str, Path], day: int, widths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Map the three matrices of a day, and check that they fit together."""
    endings = {"labels": "labels", "dense": "dense", "sparse": "sparse_contig_freq"}
    paths = {name: folders[name] / f"day_{day}_{endings[name]}.npy" for name in _PARTS}
    matrices = {name: open_matrix(path) for name, path in paths.items()}
    num_rows = len(matrices["labels"])
    for name, matrix in matrices.items():
        if matrix.shape != (num_rows, widths[name]):
            raise ValueError(
                f"{paths[name]}: shape {matrix.shape}, wanted {(num_rows, widths[name])}, since "
                f"there are {num_rows} labels"
            )
    largest = max((int(block.max()) for block in row_blocks(matrices["sparse"])), default=0)
    if largest >= 2**31:
        raise ValueError(
            f"{paths['sparse']}: id {largest} is 2**31 or more; make ids contiguous first, by "
            "BinaryCriteoUtils.sparse_to_contiguous"
        )
    return matrices


def _writers(
    stack: ExitStack, folder: Path, prefix: str, widths: Mapping[str, int]
) -> dict[str, NpyWriter]:
    """Begin the three matrices of a day, or of all."""
    return {
        name: stack.enter_context(NpyWriter(folder / f"{prefix}{name}.npy", widths[name], dtype))
        for name, dtype in _PARTS.items()
    }


def _pack(source: Mapping[str, np.ndarray]) -> Iterator[Int32[np.ndarray, "rows columns"]]:
    """Put labels, dense features (their bits) and ids side by side, block by block."""
    for parts in zip(*(row_blocks(source[name]) for name in _PARTS), strict=True):
        columns = [
            np.ascontiguousarray(part, dtype).view(np.int32)
            for part, dtype in zip(parts, _PARTS.values(), strict=True)
        ]
        yield np.concatenate(columns, axis=1)


def _append(
    writers: Mapping[str, NpyWriter],
    rows: Int32[np.ndarray, "rows columns"],
    widths: Mapping[str, int],
) -> None:
    """Take packed rows apart again and write them."""
    columns = np.split(rows, np.cumsum(list(widths.values()))[:-1], axis=1)
    for writer, part in zip(writers.values(), columns, strict=False):
        writer.append(np.ascontiguousarray(part).view(writer.dtype))


def _in_random_order(
    blocks: Iterator[Int32[np.ndarray, "rows columns"]], num_rows: int, seed: int, folder: Path
) -> Iterator[Int32[np.ndarray, "rows columns"]]:
    """Give all rows in an order that every seed draws anew, in parts that fit into memory."""
    generator = np.random.RandomState(seed)
    num_buckets = -(-num_rows // BUCKET_ROWS)
    if num_buckets <= 1:
        parts = list(blocks)
        if parts:
            yield np.concatenate(parts)[generator.permutation(num_rows)]
        return
    with TemporaryDirectory(dir=folder) as temporary:
        paths = [Path(temporary) / f"{number}.npy" for number in range(num_buckets)]
        first = next(blocks)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(NpyWriter(path, first.shape[1], np.int32)) for path in paths
            ]
            for block in chain([first], blocks):
                bucket = generator.randint(num_buckets, size=len(block))
                for number, writer in enumerate(writers):
                    writer.append(block[bucket == number])
        for path in paths:
            rows = np.load(path)
            yield rows[generator.permutation(len(rows))]
