"""`InMemoryBinaryCriteoIterDataPipe`: Criteo's preprocessed days as batches for ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data.batch import Batch
from shardwise.data.criteo_fields import DEFAULT_CAT_NAMES
from shardwise.data.criteo_paths import PATH_MANAGER_KEY, check_path_manager
from shardwise.data.npy import open_matrix
from shardwise.data.position import check_units
from shardwise.jagged import KeyedJaggedTensor

_STAGES = ("train", "val", "test")


class InMemoryBinaryCriteoIterDataPipe(IterableDataset[Batch]):
    """The matrices of `BinaryCriteoUtils` as batches, one id per bag, for one rank.

    All ranks count through the same batches and take them in turn, so that together they see
    every row once and each has as many batches as the others. What is left for the last
    round is shared evenly; ranks for which that leaves no row get an empty batch. Every iteration
    gives the same batches. Under `DataLoader(pipe, batch_size=None)` workers share them out.

    `state_dict` gives the position, which counts the rows that all ranks together were given, so
    that the next iteration of a pipe with another batch size or number of ranks can go on from it.
    It moves where batches are made: under a `DataLoader` with workers, in their copies only.

    Args:
        stage: "train" takes all rows of all files. "val" and "test" take the halves of the one file
            given, val the first, which has the odd row.
        dense_paths: Dense features [rows, dense], file by file.
        sparse_paths: Ids [rows, 26] of the same rows.
        labels_paths: Labels [rows, 1] of the same rows.
        batch_size: Samples per batch and rank.
        rank: Whose batches to give.
        world_size: How many ranks there are.
        drop_last: Whether to leave out the last round if it is not full.
        shuffle_batches: Whether the rows of each batch are put into random order.
        shuffle_training_set: Whether, in stage train, batches are made of all rows in a random
            order, which is the same on all ranks and takes 8 bytes per row.
        shuffle_training_set_random_seed: Of both orders.
        mmap_mode: Whether rows are read from the files when a batch is made. If not, those of this
            rank are read into memory, once.
        hashes: Ids are taken modulo the number of their column; None leaves them as they are.
        path_manager_key: Files are opened as local ones; any other key is an error.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: An argument is out of its range, or files do not fit together.
    """

    def __init__(  # noqa: PLR0913  # the parameters of the field's vocabulary
        self,
        stage: str,
        dense_paths: Sequence[str | Path],
        sparse_paths: Sequence[str | Path],
        labels_paths: Sequence[str | Path],
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool = False,
        shuffle_batches: bool = False,
        shuffle_training_set: bool = False,
        shuffle_training_set_random_seed: int = 0,
        mmap_mode: bool = False,
        hashes: Sequence[int] | None = None,
        path_manager_key: str = PATH_MANAGER_KEY,
    ) -> None:
        super().__init__()
        check_path_manager(path_manager_key)
        _check(stage, (dense_paths, sparse_paths, labels_paths), (batch_size, rank, world_size))
        self.stage = stage
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.shuffle_batches = shuffle_batches
        self.seed = shuffle_training_set_random_seed
        self.keys = DEFAULT_CAT_NAMES
        self.hashes = None if hashes is None else np.array(hashes, np.int64)
        self._files = _open_files(dense_paths, sparse_paths, labels_paths)
        if self.hashes is not None and (self.hashes.shape != (26,) or self.hashes.min() < 1):
            raise ValueError(
                f"InMemoryBinaryCriteoIterDataPipe: hashes {hashes}; give 26 numbers of at least 1"
            )
        self._first_row, self._num_rows = self._rows_of_stage()
        self._order = None
        if shuffle_training_set and stage == "train":
            self._order = np.random.default_rng(self.seed).permutation(self._num_rows)
        self._begin = self._next_row = 0
        self._loaded: dict[int, list[np.ndarray]] = {}  # by the first row of their round
        if not mmap_mode:
            firsts = self._rounds(0)
            self._loaded = {first: self._read(first) for first in firsts}

    def __len__(self) -> int:
        """Give the number of batches, alike on all ranks."""
        return len(self._rounds(0))

    def __iter__(self) -> Iterator[Batch]:
        """Give this rank's batches, or this worker's share of them."""
        worker = get_worker_info()
        share, num_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rounds, self._begin = self._rounds(self._begin), 0
        for first in rounds[share::num_shares]:
            self._next_row = min(first + rounds.step, self._num_rows)
            parts = self._loaded.get(first)
            yield self._to_batch(self._read(first) if parts is None else parts)

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the latest iteration, and what it counts in."""
        return self._units() | {"next_row": self._next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; the ones after it begin at the start.

        Raises:
            ValueError: It was saved with other rows, or in another order of them.
        """
        check_units(type(self).__name__, state, self._units())
        self._begin = self._next_row = state["next_row"]

    def _units(self) -> dict[str, Any]:
        shuffled = self._order is not None
        seed = self.seed if shuffled or self.shuffle_batches else None
        return {"stage": self.stage, "num_rows": self._num_rows, "shuffled": shuffled, "seed": seed}

    def _rounds(self, begin: int) -> range:
        """Give the first row of each round from here on."""
        rows_per_round = self.batch_size * self.world_size
        short = rows_per_round - 1 if self.drop_last else 0
        return range(begin, max(self._num_rows - short, begin), rows_per_round)

    def _rows_of_stage(self) -> tuple[int, int]:
        """Give the first row and the number of rows, counted over all files."""
        total = sum(len(dense) for dense, _, _ in self._files)
        half = -(-total // 2)
        return {"train": (0, total), "val": (0, half), "test": (half, total - half)}[self.stage]

    def _rows_of_batch(self, first: int) -> Int64[np.ndarray, " batch"]:
        """Give the rows of this rank in the round that begins with this one."""
        size, more = self.batch_size, 0
        if self._num_rows - first < size * self.world_size:
            size, more = divmod(self._num_rows - first, self.world_size)
        start = first + self.rank * size + min(self.rank, more)
        positions = np.arange(start, start + size + (self.rank < more))
        rows = positions if self._order is None else self._order[positions]
        if self.shuffle_batches:
            rows = np.random.default_rng([self.seed, first, self.rank]).permutation(rows)
        return np.asarray(rows + self._first_row)

    def _read(self, first: int) -> list[np.ndarray]:
        """Read the dense features, ids and labels of a round's batch from the files."""
        rows = self._rows_of_batch(first)
        starts = np.cumsum([0] + [len(dense) for dense, _, _ in self._files])
        parts = [np.empty((len(rows), part.shape[1]), part.dtype) for part in self._files[0]]
        for file, start, stop in zip(self._files, starts, starts[1:], strict=False):
            here = np.flatnonzero((rows >= start) & (rows < stop))
            if len(here):
                for part, matrix in zip(parts, file, strict=True):
                    part[here] = matrix[rows[here] - start]
        if self.hashes is not None:
            # The remainder is under the id itself, so it fits wherever the id does.
            parts[1] = (parts[1] % self.hashes).astype(parts[1].dtype)
        return parts

    def _to_batch(self, parts: list[np.ndarray]) -> Batch:
        dense, sparse, labels = parts
        num_bags = sparse.size
        features = KeyedJaggedTensor(
            list(self.keys),
            torch.from_numpy(np.ascontiguousarray(sparse.T).reshape(-1)),
            lengths=torch.ones(num_bags, dtype=torch.int32),
            offsets=torch.arange(num_bags + 1, dtype=torch.int32),
            stride=len(dense),
        )
        return Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=features,
            labels=torch.from_numpy(labels.reshape(-1)),
        )


def _check(
    stage: str, paths: tuple[Sequence[str | Path], ...], numbers: tuple[int, int, int]
) -> None:
    batch_size, rank, world_size = numbers
    if stage not in _STAGES or batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"InMemoryBinaryCriteoIterDataPipe: stage {stage!r}, batch_size {batch_size}, rank "
            f"{rank} of {world_size}; wanted one of {_STAGES}, at least 1, a rank below world_size"
        )
    counts = [len(each) for each in paths]
    if len(set(counts)) > 1 or counts[0] < 1 or (stage != "train" and counts[0] > 1):
        raise ValueError(
            f"InMemoryBinaryCriteoIterDataPipe: {counts} dense, sparse and labels paths for stage "
            f"{stage!r}; give as many of each, and one of each for val and test, which halve it"
        )


def _open_files(*paths: Sequence[str | Path]) -> list[tuple[np.ndarray, ...]]:
    """Map the three matrices of each file, and check that they fit together."""
    files: list[tuple[np.ndarray, ...]] = []
    for three in zip(*paths, strict=True):
        dense, sparse, labels = map(open_matrix, three)
        shapes = (dense.shape, sparse.shape, labels.shape)
        wanted = (
            (len(dense), dense.shape[1]),
            (len(dense), len(DEFAULT_CAT_NAMES)),
            (len(dense), 1),
        )
        if shapes != wanted:
            raise ValueError(
                f"{', '.join(map(str, three))}: shapes {shapes}, wanted {wanted}: as many rows"
            )
        kinds = tuple(matrix.dtype for matrix in (dense, sparse, labels))
        if files and (files[0][0].shape[1], *(m.dtype for m in files[0])) != (
            dense.shape[1],
            *kinds,
        ):
            raise ValueError(
                f"{three[0]}: {dense.shape[1]} dense columns and dtypes {kinds}, other than the "
                "first files; make all by BinaryCriteoUtils"
            )
        files.append((dense, sparse, labels))
    return files
