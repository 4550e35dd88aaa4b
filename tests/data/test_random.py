import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from shardwise.data import Batch, RandomRecDataset


def first(**settings) -> Batch:
    return next(iter(RandomRecDataset(["a", "b"], 64, manual_seed=1, **settings)))


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.dense_features, other.dense_features)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.sparse_features.values(), other.sparse_features.values())
        and torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
    )


def test_types_and_sizes_by_default():
    batch = first()
    assert (batch.dense_features.dtype, batch.dense_features.shape) == (torch.float32, (64, 50))
    assert (batch.labels.dtype, batch.labels.shape) == (torch.int64, (64,))
    assert set(batch.labels.tolist()) == {0, 1}
    sparse = batch.sparse_features
    assert (sparse.keys(), sparse.stride()) == (["a", "b"], 64)
    assert (sparse.lengths().dtype, sparse.values().dtype) == (torch.int32, torch.int64)
    assert 90 < int(sparse.values().max()) < 100
    batch.validate()


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [{0, 1, 2}, {0, 1, 2}]),
        ({"ids_per_feature": 3}, [{3}, {3}]),
        ({"ids_per_feature": 3, "min_ids_per_feature": 2}, [{2, 3}, {2, 3}]),
        ({"ids_per_features": [1, 0]}, [{0, 1}, {0}]),
        ({"ids_per_features": [3, 2], "min_ids_per_features": [2, 2]}, [{2, 3}, {2}]),
        ({"ids_per_features": [2, 3], "min_ids_per_feature": 2}, [{2}, {2, 3}]),
    ],
)
def test_lengths_follow_the_settings(settings, lengths):
    found = first(**settings).sparse_features.lengths().view(2, -1)
    assert [set(row.tolist()) for row in found] == lengths


def test_each_key_has_its_own_ids():
    bags = first(hash_sizes=[1, 5], ids_per_feature=2).sparse_features.to_dict()
    assert bags["a"].values().unique().tolist() == [0]
    assert bags["b"].values().unique().tolist() == [0, 1, 2, 3, 4]


def test_draws_come_in_the_promised_order():
    generator = torch.Generator().manual_seed(1)
    lengths, values = [], []
    for size in (7, 9):
        drawn = torch.randint(0, 3, (64,), generator=generator, dtype=torch.int32)
        lengths.append(drawn)
        values.append(torch.randint(0, size, (int(drawn.sum()),), generator=generator))
    dense = torch.randn(64, 4, generator=generator)
    labels = torch.randint(0, 2, (64,), generator=generator)
    batch = first(hash_sizes=[7, 9], num_dense=4)
    assert torch.equal(batch.sparse_features.values(), torch.cat(values))
    assert torch.equal(batch.sparse_features.lengths(), torch.cat(lengths))
    assert torch.equal(batch.dense_features, dense)
    assert torch.equal(batch.labels, labels)


def test_generated_batches_repeat_in_turn():
    dataset = RandomRecDataset(["a"], 4, num_batches=5, num_generated_batches=2)
    batches = list(dataset)
    assert len(dataset) == len(batches) == 5
    assert same(batches[0], batches[2])
    assert same(batches[1], batches[3])
    assert not same(batches[0], batches[1])
    assert same(batches[0], next(iter(dataset)))


def test_fresh_batches_never_repeat():
    dataset = RandomRecDataset(["a"], 4, num_batches=3, num_generated_batches=-1)
    batches = list(dataset) + list(dataset)
    assert not any(same(*pair) for pair in itertools.combinations(batches, 2))


def test_without_num_batches_it_never_ends():
    dataset = RandomRecDataset(["a"], 4)
    assert len(list(itertools.islice(dataset, 25))) == 25
    with pytest.raises(TypeError, match="never ends"):
        len(dataset)


def test_workers_together_give_the_sequence_of_one_process():
    dataset = RandomRecDataset(["a", "b"], 4, manual_seed=3, num_batches=7, num_generated_batches=3)
    together = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert len(together) == 7
    assert all(same(*pair) for pair in zip(together, dataset, strict=True))


def test_workers_draw_different_fresh_batches():
    dataset = RandomRecDataset(["a"], 4, manual_seed=3, num_batches=4, num_generated_batches=-1)
    batches = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert len(batches) == 4
    assert not any(same(*pair) for pair in itertools.combinations(batches, 2))


FAULTS = [
    ({"hash_size": 5, "hash_sizes": [5, 5]}, "hash_size and hash_sizes are both given"),
    ({"ids_per_feature": 5, "ids_per_features": [5, 5]}, "ids_per_features are both given"),
    ({"min_ids_per_feature": 0, "min_ids_per_features": [0, 0]}, "are both given; give one"),
    ({"hash_sizes": [5]}, r"hash_sizes has 1 numbers for 2 keys \['a', 'b'\]"),
    ({"ids_per_features": [5, 5, 5]}, "ids_per_features has 3 numbers for 2 keys"),
    ({"min_ids_per_features": []}, "min_ids_per_features has 0 numbers for 2 keys"),
    ({"hash_sizes": [5, 0]}, "hash_size of key 'b' is 0; at least 1"),
    ({"ids_per_features": [-1, 1]}, "ids_per_feature of key 'a' is -1; at least 0"),
    ({"min_ids_per_feature": 3}, "key 'a': at least 3 ids per bag but at most 2"),
    ({"num_generated_batches": 0}, "num_generated_batches is 0; give at least 1, or a negative"),
]


@pytest.mark.parametrize(("settings", "message"), FAULTS)
def test_contradiction_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        first(**settings)
