import numpy as np
import pytest
import torch

from shardwise.data import SampleLoader
from shardwise.data.folders import data_folder
from shardwise.data.sequence_samples import held_out_samples, training_samples
from shardwise.data.sequences import build_sequences, leave_one_out, read_sequences

BEAUTY = "s3rec/Beauty.txt"

EVENTS = {
    "user": np.array(["b", "a", "b", "a", "b", "c"]),
    "item": np.array([30, 10, 20, 30, 30, 40]),
    "time": np.array([5, 2, 1, 1, 9, 3]),
}


def lists(sequences):
    return [part.tolist() for part in np.split(sequences.items, sequences.starts[1:])]


def write(folder, text, name="Beauty.txt"):
    path = folder / name
    path.write_text(text)
    return path


def five_users(folder):
    """User u has the items u * 10 + 1, …, u of them for u = 1 … 5."""
    lines = [[u, *range(u * 10 + 1, u * 10 + 1 + u)] for u in range(1, 6)]
    return read_sequences(write(folder, "".join(" ".join(map(str, x)) + "\n" for x in lines)))


# ---- from a table


def test_events_are_ordered_by_time_within_their_user():
    sequences = build_sequences(EVENTS)
    assert sequences.users.tolist() == ["a", "b", "c"]
    names = [sequences.item_names[np.array(items) - 1].tolist() for items in lists(sequences)]
    assert names == [[30, 10], [20, 30, 30], [40]]
    assert sequences.num_items == 4


def test_events_at_one_moment_keep_their_order():
    table = {"u": [1] * 4, "i": [4, 2, 3, 1], "t": [7, 7, 7, 0]}
    assert lists(build_sequences(table, user="u", item="i", time="t")) == [[1, 4, 2, 3]]


def test_polars_frame_with_dates_does_as_well():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({name: column.tolist() for name, column in EVENTS.items()})
    frame = frame.with_columns(polars.from_epoch("time"))
    assert lists(build_sequences(frame)) == lists(build_sequences(EVENTS))


def test_users_and_items_are_left_out_until_all_have_enough():
    # Item 3 goes, so user 2 has too few; with user 2 goes item 2, and user 1 is down to item 1.
    table = {
        "user": [1, 1, 2, 2, 3, 3, 3],
        "item": [1, 1, 2, 3, 1, 1, 2],
        "time": np.arange(7),
    }
    sequences = build_sequences(table, min_per_user=2, min_per_item=2)
    assert (sequences.users.tolist(), sequences.item_names.tolist()) == ([1, 3], [1])
    assert lists(sequences) == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": np.arange(5)}, "6 of 'user', 5 of 'item' and 6 of 'time'"),
        ({"time": np.array([1, 2, np.nan, 3, 4, 5])}, "column 'time' lacks a value in row 2"),
        ({"time": np.array(["2020", "NaT"] * 3, "M8[s]")}, "column 'time' lacks a value in row 1"),
        ({"user": np.array(["a", None] * 3)}, "column 'user' lacks a value in row 1"),
    ],
)
def test_damaged_table_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_sequences(EVENTS | change)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="of 6 events none is left with 4 per user and 1 per item"):
        build_sequences(EVENTS, min_per_user=4)
    with pytest.raises(KeyError, match="who"):
        build_sequences(EVENTS, user="who")


# ---- from a file


def test_lines_are_read_as_they_are(tmp_path):
    sequences = read_sequences(write(tmp_path, "7 3 1 3\r\n2 9\n"))
    assert (sequences.users.tolist(), lists(sequences)) == ([7, 2], [[3, 1, 3], [9]])
    assert sequences.num_items == 9


FAULTS = {
    "empty": ("", "the file is empty"),
    "cut off": ("1 2\n2 3", "ends in mid-line, wanted a newline"),
    "no item": ("1 2\n2\n", "line 2: found '2', wanted a user and at least one item"),
    "blank line": ("1 2\n\n2 3\n", "line 2: found '', wanted"),
    "word": ("1 2 x\n", "line 1: found '1 2 x', wanted"),
    "item zero": ("1 0\n", "line 1: found '1 0', wanted"),
    "two blanks": ("1  2\n", "line 1: found '1  2', wanted"),
    "too large": ("1 " + "9" * 30 + "\n", "line 1: found '1 999"),
    "user twice": ("1 2\n3 4\n1 5\n", "line 3: user 1 was in line 1 already"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_file_names_line_and_what_is_wanted(tmp_path, fault):
    text, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"Beauty\.txt: {message}"):
        read_sequences(write(tmp_path, text))


def test_absent_file_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Toys\.txt: no such file; get .*S3Rec"):
        read_sequences(name="Toys")


# ---- parts


def test_last_two_items_are_held_out(tmp_path):
    split = leave_one_out(five_users(tmp_path))
    assert lists(split.train) == [[11], [21, 22], [31], [41, 42], [51, 52, 53]]
    assert lists(split.validation.histories) == [[31], [41, 42], [51, 52, 53]]
    assert split.validation.targets.tolist() == [32, 43, 54]
    assert lists(split.test.histories) == [[31, 32], [41, 42, 43], [51, 52, 53, 54]]
    assert split.test.targets.tolist() == [33, 44, 55]
    assert split.test.histories.users.tolist() == [3, 4, 5]


@pytest.mark.skipif(
    not (data_folder() / BEAUTY).is_file(), reason=f"needs $SHARDWISE_DATA/{BEAUTY}"
)
def test_beauty_has_its_published_size():
    sequences = read_sequences()
    assert (len(sequences), sequences.num_items) == (22_363, 12_101)
    assert len(sequences.items) == 198_502
    split = leave_one_out(sequences)
    assert len(split.train.items) == 198_502 - 2 * 22_363
    assert lists(sequences)[0] == [1, 2, 3, 4, 5]


# ---- batches


def test_training_batch_has_the_next_item_of_each_latest_item(tmp_path):
    batch = training_samples(five_users(tmp_path), max_length=3).batch()
    bags = [bag.tolist() for bag in batch.features["item"].to_dense()]
    assert bags == [[21], [31, 32], [41, 42, 43], [52, 53, 54]]
    assert batch.targets.tolist() == [22, 32, 33, 42, 43, 44, 53, 54, 55]


def test_held_out_batch_has_one_target_per_sequence(tmp_path):
    held_out = leave_one_out(five_users(tmp_path)).test
    batch = held_out_samples(held_out, max_length=2, key="movie").batch()
    bags = [bag.tolist() for bag in batch.features["movie"].to_dense()]
    assert bags == [[31, 32], [42, 43], [53, 54]]
    assert batch.targets.tolist() == [33, 44, 55]


@pytest.mark.parametrize("is_training", [True, False])
def test_selected_samples_make_the_batch_of_their_rows(tmp_path, is_training):
    sequences = five_users(tmp_path)
    samples = training_samples(sequences, max_length=2)
    if not is_training:
        samples = held_out_samples(leave_one_out(sequences).test, max_length=2)
    rows = torch.tensor([2, 0, 2])
    ones = [samples.select(rows[i : i + 1]).batch() for i in range(3)]
    batch = samples.select(rows).batch()
    assert torch.equal(batch.targets, torch.cat([one.targets for one in ones]))
    values = torch.cat([one.features.values() for one in ones])
    assert torch.equal(batch.features.values(), values)
    assert samples.select(rows[:0]).batch().targets.tolist() == []


def test_loader_shuffles_by_seed_and_goes_on_where_it_was_saved(tmp_path):
    samples = training_samples(five_users(tmp_path), max_length=3)
    unbroken, saved, resumed = (SampleLoader(samples, 1, seed=3) for _ in range(3))
    whole = [batch.targets.tolist() for _ in range(2) for batch in unbroken]
    batches = iter(saved)
    first = [next(batches).targets.tolist() for _ in range(3)]
    resumed.load_state_dict(saved.state_dict())
    rest = [batch.targets.tolist() for _ in range(2) for batch in resumed]
    assert first + rest == whole
    assert sorted(whole[:4]) == sorted(whole[4:]) != whole[:4]


def test_batch_moves_as_one(tmp_path):
    batch = training_samples(five_users(tmp_path), max_length=3).batch().to("meta")
    assert (batch.features.device().type, batch.targets.device.type) == ("meta", "meta")


def test_length_under_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_length is 0; at least 1"):
        training_samples(five_users(tmp_path), max_length=0)
