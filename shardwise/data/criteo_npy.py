"""`BinaryCriteoUtils`: from Criteo's raw days to matrices that a training run maps into memory.

The steps: `tsv_to_npys` for each day, `sparse_to_contiguous` over all days (ids without gaps, rare
ones together), `shuffle` over the training days. Each works in blocks, on files larger than memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from shardwise.data.criteo import CriteoReader
from shardwise.data.criteo_contiguous import sparse_to_contiguous
from shardwise.data.criteo_fields import CAT_FEATURE_COUNT, INT_FEATURE_COUNT, INT_HIGH
from shardwise.data.criteo_paths import PATH_MANAGER_KEY, check_path_manager
from shardwise.data.criteo_shuffle import shuffle
from shardwise.data.npy import NpyWriter, open_matrix, row_blocks

_SETS = ("criteo_1tb", "criteo_kaggle")


class BinaryCriteoUtils:
    """Functions that write and read Criteo's days as `.npy` matrices.

    Wherever there is a `path_manager_key`, files are local ones: any key but the default is an
    error.
    """

    sparse_to_contiguous = staticmethod(sparse_to_contiguous)
    shuffle = staticmethod(shuffle)

    @staticmethod
    def tsv_to_npys(
        in_file: str | Path,
        out_dense_file: str | Path,
        out_sparse_file: str | Path,
        out_labels_file: str | Path,
        dataset_name: str = "criteo_1tb",
        path_manager_key: str = PATH_MANAGER_KEY,
        *,
        has_labels: bool = True,
        on_bad_lines: Literal["raise", "skip"] = "raise",
    ) -> int:
        """Write a raw file as three matrices of the same rows.

        Dense [rows, 13] float32 is ln(x - m + 2), where m is the least number of all 13 columns of
        the file, missing ones being 0. Sparse [rows, 26] int64 are the ids, exactly. Labels [rows,
        1] are int32.

        Args:
            in_file: The raw file.
            out_dense_file: Where dense features go.
            out_sparse_file: Where ids go.
            out_labels_file: Where labels go.
            dataset_name: `criteo_1tb` or `criteo_kaggle`, whose files are alike.
            path_manager_key: See the class.
            has_labels: As of `CriteoReader`; without them, all are -1.
            on_bad_lines: As of `CriteoReader`.

        Returns:
            How many lines were skipped.
        """
        check_path_manager(path_manager_key)
        if dataset_name not in _SETS:
            raise ValueError(
                f"tsv_to_npys: dataset_name is {dataset_name!r}, wanted one of {_SETS}"
            )
        reader = CriteoReader([in_file], has_labels=has_labels, on_bad_lines=on_bad_lines)
        raw = Path(out_dense_file).with_suffix(".counts.npy")
        least = INT_HIGH
        try:
            with ExitStack() as stack:
                dense = stack.enter_context(NpyWriter(raw, INT_FEATURE_COUNT, np.int32))
                sparse = stack.enter_context(
                    NpyWriter(out_sparse_file, CAT_FEATURE_COUNT, np.int64)
                )
                labels = stack.enter_context(NpyWriter(out_labels_file, 1, np.int32))
                for rows in reader:
                    least = min(least, int(rows.dense.min()))
                    dense.append(rows.dense)
                    sparse.append(rows.sparse)
                    labels.append(rows.labels[:, None])
            with NpyWriter(out_dense_file, INT_FEATURE_COUNT, np.float32) as logs:
                for counts in row_blocks(open_matrix(raw)):
                    # In 64 bits: the difference of two 32-bit numbers needs 33.
                    logs.append(np.log(counts.astype(np.float64) - least + 2))
        finally:
            raw.unlink(missing_ok=True)
        return reader.num_skipped

    @staticmethod
    def get_shape_from_npy(
        path: str | Path, path_manager_key: str = PATH_MANAGER_KEY
    ) -> tuple[int, ...]:
        """Give the shape of a matrix, from the header of its file."""
        check_path_manager(path_manager_key)
        return tuple(open_matrix(path).shape)

    @staticmethod
    def load_npy_range(
        fname: str | Path,
        start_row: int,
        num_rows: int,
        path_manager_key: str = PATH_MANAGER_KEY,
        mmap_mode: bool = False,
    ) -> np.ndarray:
        """Give consecutive rows of a matrix, nothing else being read.

        Args:
            fname: The file.
            start_row: The first row.
            num_rows: How many.
            path_manager_key: See the class.
            mmap_mode: Whether to map them instead of reading them.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The rows are not all in the file, or it holds no matrix.
        """
        check_path_manager(path_manager_key)
        matrix = open_matrix(fname)
        if start_row < 0 or num_rows < 0 or start_row + num_rows > len(matrix):
            raise ValueError(
                f"{fname}: start_row {start_row} and num_rows {num_rows}, but it has {len(matrix)} "
                "rows"
            )
        rows = matrix[start_row : start_row + num_rows]
        return rows if mmap_mode else np.array(rows)

    @staticmethod
    def get_file_row_ranges_and_remainder(
        lengths: Sequence[int],
        rank: int,
        world_size: int,
        start_row: int = 0,
        last_row: int | None = None,
    ) -> tuple[dict[int, tuple[int, int]], int]:
        """Divide consecutive rows of some files among ranks, each getting consecutive ones.

        Args:
            lengths: Rows of each file.
            rank: Whose share is asked for.
            world_size: How many ranks there are. Shares are alike; the first ranks get the
                remainder, a row each.
            start_row: The first row to divide, counted over all files.
            last_row: The last one, included; by default that of the last file.

        Returns:
            By number of file, the first and the last row of it (included) in the rank's share;
            files without a row of it are left out. And what is left when the rows are divided
            by `world_size`.

        Raises:
            ValueError: The rank or the rows are out of range.
        """
        ends = np.cumsum([0, *lengths]).tolist()
        stop = ends[-1] if last_row is None else last_row + 1
        if not (0 <= rank < world_size and 0 <= start_row <= stop <= ends[-1]):
            raise ValueError(
                f"get_file_row_ranges_and_remainder: rank {rank} of {world_size}, start_row "
                f"{start_row}, last_row {last_row}, in files of {list(lengths)} rows"
            )
        share, remainder = divmod(stop - start_row, world_size)
        first = start_row + rank * share + min(rank, remainder)
        after = first + share + (rank < remainder)
        ranges = {
            number: (max(first, begin) - begin, min(after, end) - begin - 1)
            for number, (begin, end) in enumerate(pairwise(ends))
            if max(first, begin) < min(after, end)
        }
        return ranges, remainder
