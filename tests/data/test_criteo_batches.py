from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shardwise.data.criteo_batches import InMemoryBinaryCriteoIterDataPipe
from shardwise.data.criteo_fields import DEFAULT_CAT_NAMES


def make_files(folder, *sizes, ids=np.int64):
    """Row r of all files has dense (r, -r, 0.1), ids r + column * 1000 and label r % 2."""
    paths, start = ([], [], []), 0
    for number, size in enumerate(sizes):
        rows = np.arange(start, start + size)[:, None]
        start += size
        dense = np.concatenate([rows, -rows, np.full_like(rows, 0.1, float)], 1, dtype=np.float32)
        sparse = (rows + np.arange(26) * 1000).astype(ids)
        for each, matrix in zip(paths, (dense, sparse, (rows % 2).astype(np.int32)), strict=True):
            each.append(folder / f"{len(each)}_{number}_{matrix.shape[1]}.npy")
            np.save(each[-1], matrix)
    return paths


def pipe(paths, stage="train", batch_size=3, rank=0, world_size=1, **options):
    return InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size, rank, world_size, **options)


def rows_of(batches):
    return [[int(row) for row in batch.dense_features[:, 0]] for batch in batches]


@pytest.mark.parametrize("mmap_mode", [False, True])
def test_batches_go_across_files_with_all_parts_of_a_row(tmp_path, mmap_mode):
    batches = list(pipe(make_files(tmp_path, 4, 0, 3), mmap_mode=mmap_mode))
    assert rows_of(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    for batch, rows in zip(batches, ([0, 1, 2], [3, 4, 5], [6]), strict=True):
        batch.validate()
        assert batch.sparse_features.keys() == DEFAULT_CAT_NAMES
        assert batch.sparse_features["cat_2"].values().tolist() == [2000 + row for row in rows]
        assert batch.sparse_features.lengths().tolist() == [1] * 26 * len(rows)
        assert batch.labels.tolist() == [row % 2 for row in rows]


@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 7, 11, 12])
def test_ranks_take_turns_and_see_every_row_once(tmp_path, num_rows, mmap_mode):
    paths = make_files(tmp_path, num_rows)
    pipes = [
        pipe(paths, batch_size=2, rank=rank, world_size=3, mmap_mode=mmap_mode) for rank in range(3)
    ]
    batches = [rows_of(each) for each in pipes]
    assert (
        [len(each) for each in batches] == [len(each) for each in pipes] == [-(-num_rows // 6)] * 3
    )
    in_turn = [row for turn in zip(*batches, strict=True) for rows in turn for row in rows]
    assert in_turn == list(range(num_rows))
    last = [len(each[-1]) for each in batches if each]
    assert max(last, default=0) - min(last, default=0) <= 1


def test_last_round_can_be_dropped(tmp_path):
    paths = make_files(tmp_path, 11)
    batches = [
        rows_of(pipe(paths, batch_size=2, rank=rank, world_size=2, drop_last=True))
        for rank in range(2)
    ]
    assert batches == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(("stage", "rows"), [("val", [[0, 1, 2], [3]]), ("test", [[4, 5, 6]])])
def test_val_and_test_halve_one_file(tmp_path, stage, rows):
    assert rows_of(pipe(make_files(tmp_path, 7), stage, shuffle_training_set=True)) == rows


def test_training_set_is_shuffled_alike_on_all_ranks(tmp_path):
    paths = make_files(tmp_path, 9, 11)
    options = {"batch_size": 5, "world_size": 2, "shuffle_training_set": True}
    ranks = [rows_of(pipe(paths, rank=rank, **options)) for rank in range(2)]
    flat = [row for rank in ranks for rows in rank for row in rows]
    assert sorted(flat) == list(range(20)) != flat
    assert rows_of(pipe(paths, rank=1, mmap_mode=True, **options)) == ranks[1]
    other = pipe(paths, rank=1, shuffle_training_set_random_seed=1, **options)
    assert rows_of(other) != ranks[1]


def test_rows_are_shuffled_within_their_batch(tmp_path):
    batches = rows_of(pipe(make_files(tmp_path, 40), batch_size=20, shuffle_batches=True))
    assert [sorted(rows) for rows in batches] == [list(range(20)), list(range(20, 40))]
    assert all(rows != sorted(rows) for rows in batches)
    assert batches[0] != [row - 20 for row in batches[1]]


@pytest.mark.parametrize("ids", [np.int32, np.int64])
@pytest.mark.parametrize("mmap_mode", [False, True])
def test_ids_are_hashed_by_the_size_of_their_column(tmp_path, mmap_mode, ids):
    hashes = [7 + column for column in range(26)]
    paths = make_files(tmp_path, 5, ids=ids)
    (batch,) = pipe(paths, batch_size=5, hashes=hashes, mmap_mode=mmap_mode)
    for column, key in enumerate(DEFAULT_CAT_NAMES):
        wanted = [(row + column * 1000) % hashes[column] for row in range(5)]
        assert batch.sparse_features[key].values().tolist() == wanted
    assert batch.sparse_features.values().dtype == torch.from_numpy(np.zeros(1, ids)).dtype


def test_workers_share_the_batches_out(tmp_path, monkeypatch):
    data = pipe(make_files(tmp_path, 10), batch_size=2)
    shares = []
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr("shardwise.data.criteo_batches.get_worker_info", lambda info=info: info)
        shares.append(rows_of(data))
    assert shares == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "valid"}, "stage 'valid'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"stage": "val"}, r"\[2, 2, 2\] dense, sparse and labels paths for stage 'val'"),
        ({"hashes": [5] * 25}, "give 26 numbers of at least 1"),
        ({"hashes": [5] * 25 + [0]}, "give 26 numbers of at least 1"),
        ({"path_manager_key": "manifold"}, "path_manager_key is 'manifold'"),
    ],
)
def test_wrong_argument_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(make_files(tmp_path, 3, 3), **options)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    dense, sparse, labels = make_files(tmp_path, 3, 4)
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] dense, sparse and labels paths"):
        pipe((dense[:1], sparse, labels))
    with pytest.raises(ValueError, match=r"shapes \(\(3, 3\), \(4, 26\), \(3, 1\)\), wanted"):
        pipe((dense[:1], sparse[1:], labels[:1]))
    np.save(sparse[1], np.zeros((4, 26), np.int32))
    with pytest.raises(ValueError, match="other than the first files"):
        pipe((dense, sparse, labels))
