import numpy as np
import pytest
import torch

from shardwise.data.criteo_fields import DEFAULT_CAT_NAMES
from shardwise.data.criteo_samples import (
    KAGGLE_SAMPLE,
    MISSING,
    RARE,
    hash_ids,
    log_counts,
    read_criteo_samples,
)
from shardwise.data.folders import data_folder

pytest.importorskip("polars")


def write(folder, first_ids, labels=None):
    """Rows with the ids given in cat_0 and 7 elsewhere; int_0 counts the rows, int_1 is missing."""
    path = folder / "train.txt"
    lines = [
        "\t".join([str(i % 2), str(i), "", *["3"] * 11, f"{first:x}" if first else "", *"7" * 25])
        for i, first in enumerate(first_ids)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def ids_of(samples, key="cat_0"):
    return samples.batch().sparse_features[key].values().tolist()


def test_parts_follow_each_other(tmp_path):
    path = write(tmp_path, range(10))
    parts = read_criteo_samples(path, num_train=4, num_test=3)
    np.testing.assert_allclose(parts.train.dense[:, 0], np.log1p([0, 1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(parts.test.dense[:, 0], np.log1p([4, 5, 6]), rtol=1e-6)
    assert parts.test.labels.tolist() == [0, 1, 0]
    assert len(read_criteo_samples(path, num_train=4, num_test=None).test) == 6
    parts.train.batch().validate()


def test_ids_are_hashed_within_their_sizes(tmp_path):
    path = write(tmp_path, [0, 1, 5, 10**9, 6])
    parts = read_criteo_samples(path, num_train=4, num_test=1, hash_sizes=[7, *[100] * 25])
    assert ids_of(parts.train) == [MISSING, 3, 2, 2 + 10**9 % 5]
    assert ids_of(parts.train, "cat_25") == [9] * 4
    assert parts.num_ids == {"cat_0": 7} | dict.fromkeys(DEFAULT_CAT_NAMES[1:], 100)


def test_ids_rare_in_the_training_part_are_one(tmp_path):
    path = write(tmp_path, [1, 1, 2, 0, 2, 2, 1])
    parts = read_criteo_samples(path, num_train=4, num_test=3, min_count=2)
    assert ids_of(parts.train) == [3, 3, RARE, MISSING]
    assert ids_of(parts.test) == [RARE, RARE, 3]


def test_remainders_of_the_largest_ids_are_exact():
    ids = np.array([[2**32 - 1], [2**24 + 1]])
    assert hash_ids(ids, np.array([1_000_003])).tolist() == [
        [2 + (2**32 - 1) % 1_000_001],
        [2 + (2**24 + 1) % 1_000_001],
    ]


def test_negative_counts_are_taken_as_none():
    np.testing.assert_allclose(log_counts(np.array([[-2, 0, 1]])), [[0, 0, np.log(2)]], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "num_train 0, num_test 2000; at least 1"),
        ({"num_test": 0}, "num_test 0; at least 1"),
        ({"hash_sizes": 2}, "hash_sizes 2; give one number or 26, each at least 3"),
        ({"hash_sizes": [10] * 25}, "give one number or 26"),
        ({"num_train": 5, "num_test": 1}, r"train\.txt: 5 rows, too few for num_train 5"),
        ({"num_train": 5, "num_test": None}, "5 rows, too few for num_train 5 and num_test None"),
    ],
)
def test_wrong_number_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_criteo_samples(write(tmp_path, range(5)), **options)


def test_only_bad_lines_are_too_few_rows(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("no\n")
    with pytest.raises(ValueError, match="0 rows, too few"):
        read_criteo_samples(path, on_bad_lines="skip")


def test_absent_sample_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        read_criteo_samples()
    for part in (str(tmp_path / KAGGLE_SAMPLE), "ailab.criteo.com", "train.txt", "$SHARDWISE_DATA"):
        assert part in str(caught.value)


@pytest.mark.skipif(
    not (data_folder() / KAGGLE_SAMPLE).is_file(), reason=f"needs $SHARDWISE_DATA/{KAGGLE_SAMPLE}"
)
def test_a_linear_model_learns_from_the_sample():
    parts = read_criteo_samples(hash_sizes=2000, min_count=10)
    weight = torch.zeros(26, 2000, requires_grad=True)
    dense_weight = torch.zeros(13, requires_grad=True)
    optimizer = torch.optim.Adam([weight, dense_weight], lr=0.02)

    def logits(samples):
        ids = samples.values.view(26, -1)
        return weight.gather(1, ids).sum(0) + samples.dense @ dense_weight

    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        loss(logits(parts.train), parts.train.labels).backward()
        optimizer.step()
    from sklearn.metrics import roc_auc_score

    auc = roc_auc_score(parts.test.labels, logits(parts.test).detach())
    assert auc > 0.72
