"""Batches and where they come from: random ones and MovieLens.

`movielens` reads an edition, `movielens_samples` makes features of it (by `movielens_past` and
`earlier`, which keep the future out), `samples` hands them out, `movielens_baselines` says what a
model must beat. Only reading a file needs polars.
"""

from shardwise.data.batch import Batch
from shardwise.data.random import RandomRecDataset
from shardwise.data.samples import SampleLoader, Samples

__all__ = ["Batch", "RandomRecDataset", "SampleLoader", "Samples"]
