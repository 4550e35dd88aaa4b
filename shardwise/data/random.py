"""`RandomRecDataset`: batches of random ids, dense numbers and labels, for tests and benchmarks."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data.batch import Batch
from shardwise.data.position import check_units
from shardwise.jagged import KeyedJaggedTensor


class RandomRecDataset(IterableDataset[Batch]):
    """Random batches in the shape of a click log.

    Lengths of bags are uniform in [min, max], ids uniform in [0, hash size), dense features
    standard normal (float32), labels 0 or 1 (int64). Each batch draws, from one generator, for
    every key its lengths and then its ids, then the dense features, then the labels.

    Use it as it is or under `DataLoader(dataset, batch_size=None)`. Workers share the batches out:
    together they give the same sequence as one process. Only of fresh batches (below) each
    worker draws its own sequence.

    `state_dict` gives the position and the state of the generator, so that another data set goes on
    with the same batches, also where no seed was given. It moves where batches are handed out:
    under a `DataLoader` with workers, in their copies only. Ranks that draw from seeds of their own
    save one each; those that a resumed run has more begin with a new seed: nothing can be lost.

    Args:
        keys: Names of the sparse features.
        batch_size: Samples per batch.
        hash_size: Number of ids of every key; 100 when `hash_sizes` is not given either.
        hash_sizes: Number of ids of each key.
        ids_per_feature: Length of every bag, or the greatest when a minimum is given; without
            `ids_per_features` either, the greatest length is 2.
        ids_per_features: Greatest length of the bags of each key.
        num_dense: Number of dense features.
        manual_seed: Seed of the generator; by default each data set differs.
        num_batches: Batches per iteration; by default it never ends, and has no `len`.
        num_generated_batches: This many batches are made at construction and repeated in turn;
            if negative, each batch is made afresh when asked for.
        min_ids_per_feature: Least length of every bag; by default `ids_per_feature`, or 0 where
            that is not given.
        min_ids_per_features: Least length of the bags of each key.

    Raises:
        ValueError: Both forms of one setting are given, a list has another length than `keys`, or
            a number is out of its range.
    """

    def __init__(  # noqa: PLR0913  # the parameters of the field's vocabulary
        self,
        keys: list[str],
        batch_size: int,
        hash_size: int | None = None,
        hash_sizes: list[int] | None = None,
        ids_per_feature: int | None = None,
        ids_per_features: list[int] | None = None,
        num_dense: int = 50,
        manual_seed: int | None = None,
        num_batches: int | None = None,
        num_generated_batches: int = 10,
        min_ids_per_feature: int | None = None,
        min_ids_per_features: list[int] | None = None,
    ) -> None:
        super().__init__()
        if num_generated_batches == 0:
            raise ValueError(
                "RandomRecDataset: num_generated_batches is 0; give at least 1, or a negative "
                "number for fresh batches"
            )
        fixed_length = 0 if ids_per_feature is None else ids_per_feature
        self.keys = keys
        self.batch_size = batch_size
        self.num_dense = num_dense
        self.num_batches = num_batches
        self.hash_sizes = _per_key("hash_size", keys, hash_size, hash_sizes, 100, least=1)
        self.max_ids = _per_key("ids_per_feature", keys, ids_per_feature, ids_per_features, 2)
        self.min_ids = _per_key(
            "min_ids_per_feature", keys, min_ids_per_feature, min_ids_per_features, fixed_length
        )
        for key, low, high in zip(keys, self.min_ids, self.max_ids, strict=True):
            if low > high:
                raise ValueError(
                    f"RandomRecDataset: key {key!r}: at least {low} ids per bag but at most {high}"
                )
        self._is_seeded = manual_seed is not None
        self._generator = torch.Generator()
        if manual_seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(manual_seed)
        self._begin = self._next_batch = 0
        self._batches = [self._draw() for _ in range(num_generated_batches)]

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches, or this worker's share of them."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None and not self._batches:
            # The workers hold copies of one generator and would all draw the same.
            seed = self._generator.initial_seed() + worker.id if self._is_seeded else worker.seed
            self._generator.manual_seed(seed)
        numbers = itertools.count() if self.num_batches is None else range(self.num_batches)
        begin, self._begin = self._begin, 0
        for number in itertools.islice(numbers, begin + first, None, step):
            batch = self._batches[number % len(self._batches)] if self._batches else self._draw()
            self._next_batch = number + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the latest iteration, and what is drawn from there on."""
        generator = self._generator
        position = {"next_batch": self._next_batch, "generator": generator.get_state()}
        return self._units() | position | {"seed": generator.initial_seed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; the ones after it begin at the start.

        Raises:
            ValueError: It was saved with other settings, or another seed than is given here.
        """
        units = self._units()
        if self._is_seeded:
            units["seed"] = self._generator.initial_seed()
        check_units("RandomRecDataset", state, units)
        if state["seed"] != self._generator.initial_seed():
            self._generator.manual_seed(state["seed"])
            self._batches = [self._draw() for _ in self._batches]
        self._generator.set_state(state["generator"].clone())
        self._begin = self._next_batch = state["next_batch"]

    def _units(self) -> dict[str, Any]:
        ids = [list(sizes) for sizes in (self.hash_sizes, self.min_ids, self.max_ids)]
        sizes = {"batch_size": self.batch_size, "num_dense": self.num_dense}
        return sizes | {"num_generated_batches": len(self._batches), "ids": ids}

    def __len__(self) -> int:
        """Give the number of batches per iteration.

        Raises:
            TypeError: `num_batches` was not given, so there is no end.
        """
        if self.num_batches is None:
            raise TypeError("RandomRecDataset: without num_batches it never ends and has no len()")
        return self.num_batches

    def _draw(self) -> Batch:
        """Make one batch; the order of the draws is part of the contract."""
        generator = self._generator
        lengths, values = [], []
        for hash_size, low, high in zip(self.hash_sizes, self.min_ids, self.max_ids, strict=True):
            size = (self.batch_size,)
            drawn = torch.randint(low, high + 1, size, generator=generator, dtype=torch.int32)
            lengths.append(drawn)
            values.append(torch.randint(hash_size, (int(drawn.sum()),), generator=generator))
        dense = torch.randn(self.batch_size, self.num_dense, generator=generator)
        labels = torch.randint(2, (self.batch_size,), generator=generator)
        sparse = KeyedJaggedTensor.from_lengths_sync(
            keys=self.keys, values=torch.cat(values), lengths=torch.cat(lengths)
        )
        return Batch(dense_features=dense, sparse_features=sparse, labels=labels)


def _per_key(
    name: str,
    keys: list[str],
    one: int | None,
    each: list[int] | None,
    default: int,
    least: int = 0,
) -> list[int]:
    """Choose between a number for all keys, a list, and the default."""
    if one is not None and each is not None:
        raise ValueError(f"RandomRecDataset: {name} and {name}s are both given; give one of them")
    numbers = [default if one is None else one] * len(keys) if each is None else each
    if len(numbers) != len(keys):
        raise ValueError(
            f"RandomRecDataset: {name}s has {len(numbers)} numbers for {len(keys)} keys {keys}; "
            "give one per key"
        )
    for key, number in zip(keys, numbers, strict=True):
        if number < least:
            raise ValueError(
                f"RandomRecDataset: {name} of key {key!r} is {number}; at least {least} is needed"
            )
    return numbers
