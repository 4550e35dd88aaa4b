import gzip
import itertools
import re
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shardwise.data.criteo import CriteoReader, criteo_kaggle, criteo_terabyte, row_to_dict
from shardwise.data.criteo_fields import (
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    parse_lines,
    split_faulty,
)
from shardwise.data.folders import data_folder

pytest.importorskip("polars")

SAMPLE = "criteo-kaggle-10k/train_examples.txt"


def line(label="0", ints=("1",) * 13, cats=("68fd1e64",) * 26, end="\n") -> str:
    return "\t".join([label, *ints, *cats]) + end


def write(folder: Path, content: str | bytes, name="train.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else content)
    return path


def lines(count: int) -> str:
    """Line i has label i % 2, int_0 = i, cat_0 = i, every third cat_25 missing."""
    return "".join(
        line(
            str(i % 2),
            (str(i), "-2", *[""] * 11),
            (f"{i:08x}", *["FFFFFFFF"] * 24, "" if i % 3 == 0 else "a"),
        )
        for i in range(count)
    )


def test_missing_numbers_and_ids_are_zero(tmp_path):
    (rows,) = CriteoReader([write(tmp_path, lines(4))])
    assert rows.labels.tolist() == [0, 1, 0, 1]
    assert rows.dense[:, :3].tolist() == [[i, -2, 0] for i in range(4)]
    assert rows.sparse[:, 0].tolist() == [0, 1, 2, 3]
    assert rows.sparse[:, 24:].tolist() == [[2**32 - 1, 10 * (i % 3 > 0)] for i in range(4)]


def test_rows_are_dicts_by_name(tmp_path):
    rows = list(criteo_kaggle(write(tmp_path, lines(3))))
    assert list(rows[0]) == ["label", *DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]
    assert [row["label"] for row in rows] == [0, 1, 0]
    assert rows[2]["cat_25"] == 10


def test_columns_rows_and_text_say_the_same(tmp_path):
    path = write(tmp_path, lines(50))
    texts = list(criteo_kaggle(path, row_mapper=None))
    assert [len(fields) for fields in texts] == [40] * 50
    assert list(map(row_to_dict, texts)) == list(criteo_kaggle(path))
    assert list(criteo_kaggle(path, row_mapper=lambda fields: fields[1])) == [
        str(i) for i in range(50)
    ]


def test_file_without_labels_has_label_minus_one(tmp_path):
    path = write(tmp_path, re.sub(r"(?m)^.\t", "", lines(3)))
    rows = list(criteo_kaggle(path, has_labels=False))
    assert [(row["label"], row["int_0"], row["cat_0"]) for row in rows] == [
        (-1, i, i) for i in range(3)
    ]
    texts = criteo_kaggle(path, has_labels=False, row_mapper=None)
    assert list(map(row_to_dict, texts)) == rows


def test_days_follow_each_other_gzipped_or_not(tmp_path):
    days = [write(tmp_path, lines(3), "day_0"), write(tmp_path, gzip.compress(lines(2).encode()))]
    days[1] = days[1].rename(tmp_path / "day_1.gz")
    assert [row["int_0"] for row in criteo_terabyte(days)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 333, 5000, 2**21])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\xef\xbb\xbf"])
def test_size_of_blocks_line_ends_and_byte_order_mark_do_not_matter(
    tmp_path, block_bytes, end, start
):
    path = write(tmp_path, start + lines(9).replace("\n", end))
    reader = CriteoReader([path], block_bytes=block_bytes)
    assert np.concatenate([rows.dense[:, 0] for rows in reader]).tolist() == list(range(9))


def test_workers_share_the_rows_out(tmp_path, monkeypatch):
    dataset = criteo_kaggle(write(tmp_path, lines(40)))
    dataset.reader.block_bytes = 1000
    shares = []
    for worker in range(3):
        info = SimpleNamespace(id=worker, num_workers=3)
        monkeypatch.setattr("shardwise.data.criteo.get_worker_info", lambda info=info: info)
        shares.append([row["int_0"] for row in dataset])
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == list(range(40))


def test_worker_forked_from_a_process_with_polars_is_refused(tmp_path):
    dataset = criteo_kaggle(write(tmp_path, lines(4)))
    assert len(list(dataset)) == 4
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="forked from one that has loaded polars"):
        list(loader)


@pytest.mark.slow
def test_spawned_workers_read(tmp_path):
    dataset = criteo_kaggle(write(tmp_path, lines(4)))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [row["int_0"] for row in loader] == [0, 1, 2, 3]


# ---- what is damaged


GOOD = line()
FAULTS = {
    "empty line": ("\n", r"found 1 fields, '', wanted 40"),
    "12 fields": ("1\t" * 11 + "1\n", "found 12 fields, "),
    "39 fields": (line()[2:], "found 39 fields, .* is read with has_labels=False"),
    "41 fields": (line()[:-1] + "\t1\n", "found 41 fields, "),
    "two lines in one": (line(end="\t") + line(), "found 80 fields, "),
    "no label": (line(label=""), "label is '', wanted 0 or 1"),
    "other label": (line(label="2"), "label is '2', wanted 0 or 1"),
    "negative label": (line(label="-1"), "label is '-1', wanted 0 or 1"),
    "fraction": (line(ints=("1.5",) * 13), "int_0 is '1.5', wanted an integer from -2147483648"),
    "word": (line(ints=("1",) * 12 + ("x",)), "int_12 is 'x', wanted an integer"),
    "letters of ids": (line(ints=("1", "ff", *"1" * 11)), "int_1 is 'ff', wanted an integer"),
    "two signs": (line(ints=("--1",) * 13), "int_0 is '--1', wanted an integer"),
    "bare sign": (line(ints=("-",) * 13), "int_0 is '-', wanted an integer"),
    "plus": (line(ints=("+1",) * 13), r"int_0 is '\+1', wanted an integer"),
    "blank": (line(ints=(" 1",) * 13), "int_0 is ' 1', wanted an integer"),
    "past 32 bits": (line(ints=("2147483648",) * 13), "int_0 is '2147483648', wanted an integer"),
    "past 64 bits": (line(ints=("9" * 30,) * 13), "int_0 is '9{30}', wanted an integer"),
    "not hexadecimal": (line(cats=("68fd1e6g",) * 26), "cat_0 is '68fd1e6g', wanted a hexa"),
    "prefixed": (line(cats=("0x1",) * 26), "cat_0 is '0x1', wanted a hexa"),
    "signed id": (line(cats=("1",) * 25 + ("-1",)), "cat_25 is '-1', wanted a hexa"),
    "nine digits": (line(cats=("168fd1e64",) * 26), "cat_0 is '168fd1e64', wanted a hexa"),
    "quotes": (line(cats=('"68fd1e64"',) * 26), "cat_0 is '\"68fd1e64\"', wanted a hexa"),
    "not text": (line(cats=("\xff\x00",) * 26), "cat_0 is 'ÿ.x00', wanted a hexa"),
    "lone return": (line(label="0\r1"), "label is '0.r1', wanted 0 or 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_names_file_line_and_what_is_wanted(tmp_path, fault):
    bad, message = FAULTS[fault]
    path = write(tmp_path, GOOD + GOOD + bad + GOOD)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: line 3: {message}"):
        list(CriteoReader([path]))


@pytest.mark.parametrize("block_bytes", [50, 2**21])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_skipped_and_counted(tmp_path, fault, block_bytes):
    bad, message = FAULTS[fault]
    path = write(tmp_path, lines(2) + bad + lines(5)[len(lines(2)) :] + bad)
    reader = CriteoReader([path], on_bad_lines="skip", block_bytes=block_bytes)
    assert np.concatenate([rows.dense[:, 0] for rows in reader]).tolist() == list(range(5))
    assert reader.num_skipped == 2
    assert re.search(f"line 3: {message}", reader.first_skipped)


def test_last_line_without_newline_is_cut_off(tmp_path):
    path = write(tmp_path, lines(3) + line(end=""))
    with pytest.raises(ValueError, match=r"line 4: the file ends in mid-line, after .*68fd1e64"):
        list(CriteoReader([path]))
    reader = CriteoReader([path], on_bad_lines="skip")
    assert (sum(map(len, reader)), reader.num_skipped) == (3, 1)


@pytest.mark.parametrize("content", ["", "\xef\xbb\xbf"])
@pytest.mark.parametrize("on_bad_lines", ["raise", "skip"])
def test_empty_file_is_an_error(tmp_path, content, on_bad_lines):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"train\.txt: the file is empty"):
        list(CriteoReader([path], on_bad_lines=on_bad_lines))


@pytest.mark.parametrize("keep", [15, -9])
def test_cut_off_gzip_names_the_file(tmp_path, keep):
    path = write(tmp_path, gzip.compress(lines(500).encode())[:keep], "day_0.gz")
    with pytest.raises(ValueError, match=r"day_0\.gz: cut off or not gzip"):
        list(CriteoReader([path], on_bad_lines="skip"))


@pytest.mark.parametrize("is_last", [False, True])
def test_endless_line_is_one_fault_and_is_never_held(tmp_path, is_last):
    path = write(tmp_path, lines(2))
    with path.open("ab") as file:
        for _ in range(64):
            file.write(b"f" * 2**20)
        file.write(b"" if is_last else b"\n" + lines(1).encode())
    options = {"block_bytes": 2**14, "max_line_bytes": 2**12}
    reader = CriteoReader([path], on_bad_lines="skip", **options)
    sum(map(len, CriteoReader([write(tmp_path, lines(2), "small")])))  # imports are not counted
    tracemalloc.start()
    assert sum(map(len, reader)) == 2 + (not is_last)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.num_skipped == 1
    assert "line 3: longer than 4096 bytes" in reader.first_skipped
    assert peak < 2**20
    with pytest.raises(ValueError, match="line 3: longer than 4096 bytes"):
        list(CriteoReader([path], **options))


FIELDS = st.one_of(
    st.just(""),
    st.integers(-3, 3).map(str),
    st.sampled_from(["-0", "007", "0" * 40 + "1", "2147483647", "2147483648", "-2147483649"]),
    st.sampled_from(["FFFFFFFF", "0ffffffff", "100000000", "a-b", "1e3", "nan", "null", " ", "_1"]),
    st.text("019afF-+. x\r", max_size=9),
)


@given(
    place=st.integers(0, 39), field=FIELDS, has_labels=st.booleans(), others=st.sampled_from("01")
)
def test_fast_and_slow_parsers_agree(place, field, has_labels, others):
    fields = [others] * (40 if has_labels else 39)
    fields[place % len(fields)] = field
    text = ("\t".join(fields) + "\n").encode("latin-1")
    ((_, fault),) = split_faulty(text, has_labels=has_labels)
    rows = parse_lines(text, has_labels=has_labels)
    assert (rows is None) == bool(fault)
    if rows is not None:
        row = [*rows.labels, *rows.dense[0], *rows.sparse[0]]
        assert row == list(row_to_dict(fields).values())


def test_missing_file_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file; get the click logs"):
        criteo_kaggle(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_bytes": 0}, "block_bytes 0"),
        ({"max_line_bytes": 0}, "max_line_bytes 0"),
    ],
)
def test_wrong_option_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CriteoReader([write(tmp_path, GOOD)], **options)


@pytest.mark.skipif(
    not (data_folder() / SAMPLE).is_file(), reason=f"needs $SHARDWISE_DATA/{SAMPLE}"
)
def test_sample_of_the_kaggle_set_is_read_whole():
    path = data_folder() / SAMPLE
    rows = list(criteo_kaggle(path))
    assert len(rows) == 10_000
    assert sum(row["label"] for row in rows) / 10_000 == pytest.approx(0.218, abs=0.001)
    text = path.read_text().split("\n")[-2].split("\t")
    assert rows[-1] == row_to_dict(text)
