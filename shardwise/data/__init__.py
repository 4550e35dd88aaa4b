"""Batches and where they come from: random ones, Criteo's click logs, MovieLens, sequences.

`samples` hands samples out, `position` says what a saved position counts in. Criteo: `criteo` reads
raw files (by `criteo_lines`, `criteo_fields`), `criteo_samples` makes features of them in memory;
`criteo_npy` preprocesses whole days out of core (by `criteo_contiguous`, `criteo_shuffle`) for
`criteo_batches`. MovieLens: `movielens` reads an edition, `movielens_rows` gives the large ones row
by row, `movielens_samples` makes features (by `movielens_past` and `earlier`, which keep the future
out), `movielens_baselines` says what a model must beat. `sequences` orders what each user took,
`sequence_samples` makes samples of it. Only reading a text file needs polars.
"""

from shardwise.data.batch import Batch
from shardwise.data.criteo import CriteoReader, criteo_kaggle, criteo_terabyte
from shardwise.data.criteo_batches import InMemoryBinaryCriteoIterDataPipe
from shardwise.data.criteo_fields import (
    CAT_FEATURE_COUNT,
    DAYS,
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    DEFAULT_LABEL_NAME,
    INT_FEATURE_COUNT,
)
from shardwise.data.criteo_npy import BinaryCriteoUtils
from shardwise.data.criteo_paths import PATH_MANAGER_KEY
from shardwise.data.criteo_samples import CriteoSamples, read_criteo_samples
from shardwise.data.movielens_rows import movielens_20m, movielens_25m, movielens_32m
from shardwise.data.random import RandomRecDataset
from shardwise.data.samples import SampleLoader, Samples
from shardwise.data.sequence_samples import (
    SequenceBatch,
    SequenceSamples,
    held_out_samples,
    training_samples,
)
from shardwise.data.sequences import (
    HeldOut,
    LeaveOneOut,
    Sequences,
    build_sequences,
    leave_one_out,
    read_sequences,
)

__all__ = [
    "CAT_FEATURE_COUNT",
    "DAYS",
    "DEFAULT_CAT_NAMES",
    "DEFAULT_INT_NAMES",
    "DEFAULT_LABEL_NAME",
    "INT_FEATURE_COUNT",
    "PATH_MANAGER_KEY",
    "Batch",
    "BinaryCriteoUtils",
    "CriteoReader",
    "CriteoSamples",
    "HeldOut",
    "InMemoryBinaryCriteoIterDataPipe",
    "LeaveOneOut",
    "RandomRecDataset",
    "SampleLoader",
    "Samples",
    "SequenceBatch",
    "SequenceSamples",
    "Sequences",
    "build_sequences",
    "criteo_kaggle",
    "criteo_terabyte",
    "held_out_samples",
    "leave_one_out",
    "movielens_20m",
    "movielens_25m",
    "movielens_32m",
    "read_criteo_samples",
    "read_sequences",
    "training_samples",
]
