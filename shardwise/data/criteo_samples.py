"""From the raw rows of Criteo's Kaggle set to samples to train on and to be judged by, in one call.

Ids are hashed, so that no vocabulary is fitted; dense features are counts and are taken by their
logarithm. Nothing of the test rows reaches the training rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64

from shardwise.data.criteo import FETCH, CriteoReader
from shardwise.data.criteo_fields import (
    CAT_FEATURE_COUNT,
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    CriteoRows,
)
from shardwise.data.folders import find_file
from shardwise.data.samples import Samples

KAGGLE_SAMPLE = "criteo-kaggle-10k/train_examples.txt"
"""Where in the data folder the first 10,000 lines of the Kaggle set's train.txt are looked for."""

MISSING = 0
"""The id of a missing value."""

RARE = 1
"""The id of all ids that the training rows hold too seldom."""

_FIRST_HASHED = 2


@dataclass(frozen=True, kw_only=True)
class CriteoSamples:
    """Two consecutive parts of a file.

    Attributes:
        train: The first rows.
        test: The rows after them.
        num_ids: Per sparse feature, the rows its table needs.
        dense_names: What the dense columns are called.
    """

    train: Samples
    test: Samples
    num_ids: dict[str, int]
    dense_names: tuple[str, ...] = tuple(DEFAULT_INT_NAMES)


def read_criteo_samples(
    path: str | Path | None = None,
    *,
    num_train: int = 8000,
    num_test: int | None = 2000,
    hash_sizes: int | list[int] = 10_000,
    min_count: int = 1,
    on_bad_lines: Literal["raise", "skip"] = "raise",
) -> CriteoSamples:
    """Read the first rows of a file with labels as samples.

    Args:
        path: The file; by default the sample of the Kaggle set in the data folder.
        num_train: How many rows to train on.
        num_test: How many of the next rows to be judged by; None for all that are left.
        hash_sizes: Ids of each of the 26 sparse features, or one number for all; at least 3, since
            one stands for a missing value and one for rare ids.
        min_count: Ids that a feature has in fewer training rows are one id, `RARE`.
        on_bad_lines: As of `CriteoReader`.

    Raises:
        FileNotFoundError: There is no such file; the message says what to fetch from where.
        ValueError: A number is out of range, the file has too few rows, or it is damaged.
    """
    sizes = _check_sizes(hash_sizes)
    if num_train < 1 or (num_test is not None and num_test < 1):
        raise ValueError(
            f"read_criteo_samples: num_train {num_train}, num_test {num_test}; at least 1 of each"
        )
    fetch = f"{FETCH}; the default is the first 10,000 lines of the Kaggle set's train.txt"
    found = find_file(path, default=KAGGLE_SAMPLE, fetch=fetch)
    wanted = None if num_test is None else num_train + num_test
    rows = _first_rows(CriteoReader([found], on_bad_lines=on_bad_lines), wanted)
    if len(rows) < (wanted or num_train + 1):
        raise ValueError(
            f"{found}: {len(rows)} rows, too few for num_train {num_train} and num_test {num_test}"
        )
    ids = hash_ids(rows.sparse, sizes)
    if min_count > 1:
        _merge_rare(ids, sizes, num_train, min_count)
    every = torch.arange(len(rows))
    samples = _to_samples(rows, ids)
    return CriteoSamples(
        train=samples.select(every[:num_train]),
        test=samples.select(every[num_train:]),
        num_ids=dict(zip(DEFAULT_CAT_NAMES, sizes.tolist(), strict=True)),
    )


def log_counts(counts: Int64[np.ndarray, "rows dense"]) -> Float32[np.ndarray, "rows dense"]:
    """Take ln(1 + count), a negative count (Criteo has some -1 and -2) taken as 0."""
    return np.asarray(np.log1p(np.maximum(counts, 0)), np.float32)


def hash_ids(
    ids: Int64[np.ndarray, "rows sparse"], sizes: Int64[np.ndarray, " sparse"]
) -> Int64[np.ndarray, "rows sparse"]:
    """Map ids, which are hashes already, to [2, size) by their remainder, and 0 to `MISSING`."""
    hashed = _FIRST_HASHED + ids % (sizes - _FIRST_HASHED)
    return np.where(ids == 0, MISSING, hashed)


def _check_sizes(hash_sizes: int | list[int]) -> Int64[np.ndarray, " sparse"]:
    sizes = [hash_sizes] * CAT_FEATURE_COUNT if isinstance(hash_sizes, int) else hash_sizes
    if len(sizes) != CAT_FEATURE_COUNT or min(sizes) <= _FIRST_HASHED:
        raise ValueError(
            f"read_criteo_samples: hash_sizes {hash_sizes}; give one number or "
            f"{CAT_FEATURE_COUNT}, each at least {_FIRST_HASHED + 1}"
        )
    return np.array(sizes, np.int64)


def _first_rows(reader: CriteoReader, wanted: int | None) -> CriteoRows:
    """Join the first rows of a file, no more of it being read than needed."""
    parts: list[CriteoRows] = []
    for part in reader:
        parts.append(part)
        if wanted is not None and sum(map(len, parts)) >= wanted:
            break
    # A file whose every line is skipped has no part at all.
    empty = np.empty(0, np.int64)
    shape = {"labels": empty, "dense": empty.reshape(0, 13), "sparse": empty.reshape(0, 26)}
    joined = {
        name: np.concatenate([none, *(getattr(part, name) for part in parts)])[:wanted]
        for name, none in shape.items()
    }
    return CriteoRows(**joined)


def _merge_rare(
    ids: Int64[np.ndarray, "rows sparse"],
    sizes: Int64[np.ndarray, " sparse"],
    num_train: int,
    min_count: int,
) -> None:
    """Replace, in place, the ids that are in fewer than `min_count` training rows."""
    for column, size in zip(ids.T, sizes, strict=True):
        counts = np.bincount(column[:num_train], minlength=size)
        column[(counts[column] < min_count) & (column != MISSING)] = RARE


def _to_samples(rows: CriteoRows, ids: Int64[np.ndarray, "rows sparse"]) -> Samples:
    return Samples(
        dense=torch.from_numpy(log_counts(rows.dense)),
        labels=torch.from_numpy(rows.labels.astype(np.float32)),
        keys=tuple(DEFAULT_CAT_NAMES),
        values=torch.from_numpy(np.ascontiguousarray(ids.T).reshape(-1)),
        lengths=torch.ones(ids.size, dtype=torch.int64),
    )
