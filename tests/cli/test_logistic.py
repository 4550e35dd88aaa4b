import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from shardwise.cli.logistic import hash_fields, logistic_regression
from shardwise.data import Samples


def samples(seed: int, num: int = 200) -> Samples:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, num), generator=draw)
    counts = torch.randint(5, (num, 1), generator=draw)
    chance = torch.where(ids[0] == 1, 0.8, 0.2)
    return Samples(
        dense=counts.float().log1p(),
        labels=torch.bernoulli(chance, generator=draw),
        keys=("a", "b"),
        values=ids.flatten(),
        lengths=torch.ones(2 * num, dtype=torch.int64),
    )


def test_chances_equal_those_of_scikit_learn():
    train, test = samples(0), samples(1)
    used, columns = np.unique(hash_fields(train), return_inverse=True)
    one_hot = np.zeros((len(train), len(used)))
    np.put_along_axis(one_hot, columns.reshape(len(train), -1), 1, axis=1)
    other = LogisticRegression(C=1 / 3, tol=1e-8).fit(one_hot, train.labels)
    found = np.stack([(hash_fields(test).numpy() == one).any(1) for one in used], axis=1)
    chances = logistic_regression(train, test, penalty=3.0, max_steps=100)
    np.testing.assert_allclose(chances, other.predict_proba(found)[:, 1], atol=1e-4)


def test_equal_values_of_different_fields_have_different_weights():
    numbers = hash_fields(samples(0))
    fields = [set(column.tolist()) for column in numbers.T]
    assert len(set.union(*fields)) == sum(map(len, fields))
    assert len(fields[1]) == 3


def test_large_counts_share_weights_and_small_ones_do_not():
    def numbers(*counts: int) -> set[int]:
        dense = torch.tensor(counts).float().log1p().view(-1, 1)
        none = torch.empty(0, dtype=torch.int64)
        labels = torch.zeros(len(counts))
        some = Samples(dense=dense, labels=labels, keys=(), values=none, lengths=none)
        return set(hash_fields(some).flatten().tolist())

    assert len(numbers(0, 1, 2)) == 3
    assert len(numbers(1000, 1001)) == 1


def test_unclicked_samples_alone_give_small_chances():
    train = samples(0)
    none = Samples(**{**vars(train), "labels": torch.zeros(len(train))})
    assert logistic_regression(none, samples(1)).max() < 1e-3
