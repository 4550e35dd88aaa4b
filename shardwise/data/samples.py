"""Hold samples in memory and hand them out in batches: shuffled, repeatable, resumable."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from typing_extensions import TypeVar

from shardwise.data.batch import Batch
from shardwise.data.position import check_units
from shardwise.jagged import KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N samples, the bags of ids key after key and in each sample after sample.

    Attributes:
        dense: Dense features.
        labels: 0 or 1.
        keys: Names of the F sparse features.
        values: The ids of all bags.
        lengths: Ids per bag; F·N of them.
    """

    dense: Float32[Tensor, "N dense"]
    labels: Float32[Tensor, " N"]
    keys: tuple[str, ...]
    values: Int64[Tensor, " V"]
    lengths: Int64[Tensor, " bags"]

    def __len__(self) -> int:
        """Give N."""
        return len(self.labels)

    @cached_property
    def _starts(self) -> Int64[Tensor, " bags"]:
        return self.lengths.cumsum(0) - self.lengths

    def select(self, rows: Int64[Tensor, " B"]) -> "Samples":
        """Copy some samples, in the order asked for."""
        bags = (torch.arange(len(self.keys))[:, None] * len(self) + rows).flatten()
        lengths = self.lengths[bags]
        shift = self._starts[bags] - (lengths.cumsum(0) - lengths)
        positions = torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))
        return Samples(
            dense=self.dense[rows],
            labels=self.labels[rows],
            keys=self.keys,
            values=self.values[positions],
            lengths=lengths,
        )

    def batch(self) -> Batch:
        """Give all samples as one batch; nothing is copied."""
        sparse = KeyedJaggedTensor(list(self.keys), self.values, lengths=self.lengths)
        return Batch(dense_features=self.dense, sparse_features=sparse, labels=self.labels)


BatchT = TypeVar("BatchT", default=Batch)
BatchT_co = TypeVar("BatchT_co", default=Batch, covariant=True)


@runtime_checkable
class Selectable(Protocol[BatchT_co]):
    """What a loader can hand out: so many samples, of which some can be made a batch."""

    def __len__(self) -> int:
        """Give the number of samples."""

    def select(self, rows: Int64[Tensor, " B"]) -> "Selectable[BatchT_co]":
        """Copy some samples, in the order asked for."""

    def batch(self) -> BatchT_co:
        """Give all samples as one batch."""


class SampleLoader(Generic[BatchT]):
    """Batches of samples, epoch after epoch; one iteration gives the rest of an epoch.

    The order of an epoch follows from (seed, epoch) alone. An iteration that is broken off goes on
    where it stopped, in this loader or, by way of `state_dict`, in another one. The position
    counts batches handed out, after the last of an epoch in the next one: whoever fetches ahead
    must save it as of the batch in work.

    Where several ranks train, each has a loader that hands out its share of every batch, a
    stretch of it; shares differ by one sample at most. All together are the batches of a single
    process, and the position is the same on any number of ranks.

    Args:
        samples: What to hand out; `Samples`, or anything else that can be selected from.
        batch_size: Samples per batch, all shares together; the last batch of an epoch may be
            smaller, and shares of it empty.
        seed: Of the shuffling.
        is_shuffled: Whether epochs are shuffled; if not, batches follow the order of the samples.
        rank: Which share to hand out.
        num_ranks: Shares of each batch.

    Raises:
        ValueError: The batch size is below 1, or there is no such rank.
    """

    def __init__(
        self,
        samples: Selectable[BatchT],
        batch_size: int,
        *,
        seed: int = 0,
        is_shuffled: bool = True,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"SampleLoader: batch_size is {batch_size}; at least 1 is needed")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"SampleLoader: rank {rank} is not one of {num_ranks} ranks")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.is_shuffled = is_shuffled
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0
        self._next_batch = 0
        self._shares: list[int] = []

    def __len__(self) -> int:
        """Give the number of batches of a whole epoch."""
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[BatchT]:
        """Give this rank's share of the batches left in the epoch; then comes the next epoch."""
        order, num_batches = self._order(), len(self)
        for number in range(self._next_batch, num_batches):
            start = number * self.batch_size
            over, self._next_batch = divmod(number + 1, num_batches)
            self.epoch += over
            shares = order[start : start + self.batch_size].tensor_split(self.num_ranks)
            self._shares = [len(share) for share in shares]
            yield self.samples.select(shares[self.rank]).batch()

    @property
    def shares(self) -> list[int]:
        """Samples of each rank in the batch handed out last."""
        return list(self._shares)

    def _order(self) -> Int64[Tensor, " N"]:
        if not self.is_shuffled:
            return torch.arange(len(self.samples))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.samples), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Give the position, and what it counts in."""
        return self._units() | {"epoch": self.epoch, "next_batch": self._next_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position saved by `state_dict`.

        Raises:
            ValueError: It was saved by a loader of other samples, batch size or shuffling.
        """
        check_units("SampleLoader", state, self._units())
        self.epoch, self._next_batch = state["epoch"], state["next_batch"]

    def _units(self) -> dict[str, Any]:
        return {
            "num_samples": len(self.samples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "is_shuffled": self.is_shuffled,
        }
