"""Every loader goes on from a saved position as if it had never stopped."""

import gzip
import itertools
import random

import numpy as np
import pytest
import torch

from shardwise.data import RandomRecDataset, SampleLoader, movielens_20m
from shardwise.data.criteo import CriteoReader, CriteoRowDataset
from shardwise.data.criteo_batches import InMemoryBinaryCriteoIterDataPipe
from tests.data.test_criteo_batches import make_files, rows_of
from tests.data.test_samples import order, samples

NUM_ROWS = 47


def click_lines(first: int, count: int) -> str:
    """Line i has int_0 = i; each fifth is spoilt."""
    numbers = range(first, first + count)
    return "".join(
        "\t".join(["x" if i % 5 == 4 else "1", str(i), *["2"] * 12, *["0a"] * 26]) + "\r\n"
        for i in numbers
    )


def click_reader(folder) -> CriteoReader:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + click_lines(0, 20).encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress(click_lines(20, 27).encode()))
    paths = [folder / "a.txt", folder / "b.txt.gz"]
    return CriteoReader(paths, on_bad_lines="skip", block_bytes=400)


def click_pipe(folder, **options) -> InMemoryBinaryCriteoIterDataPipe:
    return InMemoryBinaryCriteoIterDataPipe(
        "train",
        *make_files(folder, 20, 27),
        **({"batch_size": 3, "rank": 1, "world_size": 2, "shuffle_batches": True} | options),
        shuffle_training_set=True,
    )


def flat_rows(batches) -> list[int]:
    return [row for rows in rows_of(batches) for row in rows]


def make(kind: str, folder):
    """Make a loader, and what tells one of its items from others."""
    if kind == "samples":
        return SampleLoader(samples(NUM_ROWS), 4, rank=1, num_ranks=3), lambda b: order([b])
    if kind.startswith("random"):
        fresh = -1 if kind == "random, fresh" else 3
        loader = RandomRecDataset(["a"], 4, num_batches=17, num_generated_batches=fresh)
        return loader, lambda batch: batch.sparse_features.values().tolist()
    if kind == "pipe":
        return click_pipe(folder), lambda batch: rows_of([batch])
    if kind == "pipe of files":
        return click_pipe(folder, mmap_mode=True), lambda batch: rows_of([batch])
    if kind == "blocks":
        return click_reader(folder), lambda rows: rows.dense[:, 0].tolist()
    if kind == "rows":
        return CriteoRowDataset(click_reader(folder)), lambda row: row["int_0"]
    lines = [f"{i},{i % 7},3.5,{i}\n" for i in range(1, NUM_ROWS + 1)]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    return movielens_20m(folder), lambda row: row["userId"]


KINDS = "samples|random, fresh|random, repeated|pipe|pipe of files|blocks|rows|movielens"


@pytest.mark.parametrize("kind", KINDS.split("|"))
def test_position_goes_on_exactly(kind, tmp_path):
    loader, tell = make(kind, tmp_path)
    beginning = loader.state_dict()
    expected = [tell(item) for item in loader]
    for at in [*random.sample(range(len(expected)), 5), 0, len(expected) - 1]:
        loader.load_state_dict(beginning)
        taken = [tell(item) for item in itertools.islice(loader, at)]
        state = loader.state_dict()
        other, _ = make(kind, tmp_path)
        other.load_state_dict(beginning if at == 0 else state)
        assert taken + [tell(item) for item in other] == expected


@pytest.mark.parametrize("kind", ["pipe", "blocks", "rows", "movielens", "random, repeated"])
def test_iteration_after_the_resumed_one_begins_at_the_start(kind, tmp_path):
    loader, tell = make(kind, tmp_path)
    expected = [tell(item) for item in loader]
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    assert [tell(item) for item in loader] == expected[1:]
    assert [tell(item) for item in loader] == expected


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_skipped_lines_are_counted_once(kind, tmp_path):
    loader, _ = make(kind, tmp_path)
    next(itertools.islice(loader, 3, 4))
    other, _ = make(kind, tmp_path)
    other.load_state_dict(loader.state_dict())
    for _ in other:
        pass
    assert getattr(other, "reader", other).num_skipped == 9


def test_place_in_another_file_is_refused(tmp_path):
    reader = click_reader(tmp_path)
    next(iter(reader))
    (tmp_path / "a.txt").write_bytes(b"1" + click_lines(0, 20).encode())
    reader.load_state_dict(reader.state_dict())
    with pytest.raises(ValueError, match=r"a.txt: no line begins at byte \d+; the position is of"):
        next(iter(reader))


@pytest.mark.parametrize(
    ("kind", "other"), [("pipe", "seed"), ("blocks", "files"), ("movielens", "num_rows")]
)
def test_position_of_another_order_is_named(kind, other, tmp_path):
    loader, _ = make(kind, tmp_path)
    with pytest.raises(ValueError, match=f"the position was saved with {other} 99, this loader"):
        loader.load_state_dict(loader.state_dict() | {other: 99})


@pytest.mark.parametrize("kind", ["samples", "pipe"])
@pytest.mark.parametrize("counts", [(1, 2), (2, 3), (3, 1), (4, 2)])
def test_other_ranks_go_on_without_a_sample_lost_or_repeated(kind, counts, tmp_path):
    def loaders(count: int):
        if kind == "samples":
            data = samples(NUM_ROWS)
            return [SampleLoader(data, 6, rank=r, num_ranks=count) for r in range(count)]
        return [click_pipe(tmp_path, rank=rank, world_size=count) for rank in range(count)]

    read = order if kind == "samples" else flat_rows
    whole = [row for loader in loaders(1) for row in read(loader)]
    for num_taken in random.sample(range(1, 4), 2):
        before, after = loaders(counts[0]), loaders(counts[1])
        seen = [row for one in before for row in read(itertools.islice(one, num_taken))]
        states = [loader.state_dict() for loader in before]
        assert all(state == states[0] for state in states)
        for loader in after:
            loader.load_state_dict(states[0])
        rest = [row for loader in after for row in read(loader)]
        assert sorted(seen + rest) == sorted(whole) == list(range(NUM_ROWS))


def test_unseeded_batches_are_made_again(tmp_path):
    one, other = (RandomRecDataset(["a"], 4, num_batches=5) for _ in range(2))
    other.load_state_dict(one.state_dict())
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.dense_features, theirs.dense_features)
    with pytest.raises(ValueError, match="saved with seed"):
        RandomRecDataset(["a"], 4, manual_seed=7).load_state_dict(one.state_dict())


def test_pipes_of_another_batch_size_go_on(tmp_path):
    before, after = (click_pipe(tmp_path, rank=0, world_size=1, batch_size=size) for size in (5, 7))
    seen = flat_rows(itertools.islice(before, 3))
    after.load_state_dict(before.state_dict())
    assert sorted(seen + flat_rows(after)) == list(np.arange(NUM_ROWS))
