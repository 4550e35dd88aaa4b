import itertools

import pytest
import torch

from shardwise.data import SampleLoader, Samples


def samples(size: int = 10) -> Samples:
    """Sample i has dense feature i, label i % 2, ids [i] for `a` and i % 3 times i for `b`."""
    numbers = torch.arange(size)
    lengths = torch.cat([torch.ones_like(numbers), numbers % 3])
    return Samples(
        dense=numbers[:, None].float(),
        labels=(numbers % 2).float(),
        keys=("a", "b"),
        values=torch.cat([numbers, numbers.repeat_interleave(numbers % 3)]),
        lengths=lengths,
    )


def order(batches) -> list[int]:
    return [int(x) for batch in batches for x in batch.dense_features[:, 0]]


def test_selected_rows_keep_their_bags():
    batch = samples().select(torch.tensor([5, 0, 5, 4])).batch()
    assert batch.labels.tolist() == [1, 0, 1, 0]
    bags = batch.sparse_features.to_dict()
    assert [bag.tolist() for bag in bags["a"].to_dense()] == [[5], [0], [5], [4]]
    assert [bag.tolist() for bag in bags["b"].to_dense()] == [[5, 5], [], [5, 5], [4]]


def test_no_rows_make_an_empty_batch():
    batch = samples().select(torch.tensor([], dtype=torch.int64)).batch()
    batch.validate()
    assert (len(batch.labels), batch.sparse_features.values().numel()) == (0, 0)


def test_epoch_holds_every_sample_once_in_another_order():
    loader = SampleLoader(samples(), 4)
    epochs = [order(loader), order(loader)]
    assert len(loader) == 3
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1] != list(range(10))


def test_order_follows_from_seed_and_epoch():
    one, same, other = (SampleLoader(samples(), 4, seed=seed) for seed in (5, 5, 6))
    assert order(one) == order(same) != order(other)
    assert order(one) == order(same)


def test_unshuffled_samples_come_in_order():
    assert order(SampleLoader(samples(), 3, is_shuffled=False)) == list(range(10))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_shares_of_all_ranks_are_the_batches_of_one(num_ranks):
    shares = [SampleLoader(samples(), 4, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    for whole, *parts in zip(SampleLoader(samples(), 4), *shares, strict=True):
        assert [sample for part in parts for sample in order([part])] == order([whole])
        assert [len(part.labels) for part in parts] == shares[0].shares
        assert max(shares[0].shares) - min(shares[0].shares) <= 1


def test_position_is_the_same_on_any_number_of_ranks():
    one, many = SampleLoader(samples(), 4), SampleLoader(samples(), 4, rank=1, num_ranks=2)
    for loader in (one, many):
        next(iter(loader))
    assert one.state_dict() == many.state_dict()


def test_rank_that_is_none_is_named():
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        SampleLoader(samples(), 4, rank=2, num_ranks=2)


@pytest.mark.parametrize("num_taken", [0, 1, 3, 4, 5])
def test_saved_position_goes_on_exactly(num_taken):
    unbroken, saved, resumed = (SampleLoader(samples(), 3, seed=2) for _ in range(3))
    expected = order(unbroken) + order(unbroken)
    endless = itertools.chain.from_iterable(itertools.repeat(saved))
    taken = order(itertools.islice(endless, num_taken))
    resumed.load_state_dict(saved.state_dict())
    rest = order(resumed) + (order(resumed) if resumed.epoch == 1 else [])
    assert taken + rest == expected


def test_broken_off_iteration_goes_on():
    loader = SampleLoader(samples(), 3)
    taken = order(itertools.islice(loader, 2))
    assert sorted(taken + order(loader)) == list(range(10))


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (SampleLoader(samples(), 5), "batch_size 4, this loader has 5"),
        (SampleLoader(samples(), 4, seed=1), "seed 0, this loader has 1"),
        (SampleLoader(samples(9), 4), "num_samples 10, this loader has 9"),
        (SampleLoader(samples(), 4, is_shuffled=False), "is_shuffled True, this loader has False"),
    ],
)
def test_position_of_another_order_is_refused(other, name):
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(SampleLoader(samples(), 4).state_dict())


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0; at least 1 is needed"):
        SampleLoader(samples(), 0)
