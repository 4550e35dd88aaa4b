import gzip
import re

import pytest

from shardwise.data.delimited import Column, Dialect, read_columns

pytest.importorskip("polars")

COLUMNS = (
    Column(name="id", kind=int),
    Column(name="score", kind=float, low=0.5, high=5.0),
    Column(name="word", kind=str),
)


def write(tmp_path, text, name="file.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_columns_come_in_their_types(tmp_path):
    path = write(tmp_path, 'id,score,word\n7,0.5,plain\n8,5,"a, ""b"""\n9,1,\n')
    table = read_columns(path, COLUMNS, Dialect())
    assert table["id"].tolist() == [7, 8, 9]
    assert table["score"].tolist() == [0.5, 5.0, 1.0]
    assert table["word"].tolist() == ["plain", 'a, "b"', ""]


def test_gzip_is_unpacked(tmp_path):
    path = write(tmp_path, gzip.compress(b"id,score,word\n1,2,x\n"), "file.csv.gz")
    assert read_columns(path, COLUMNS, Dialect())["word"].tolist() == ["x"]


def test_long_separator_without_header_or_quotes(tmp_path):
    dialect = Dialect(separator="::", has_header=False, quotes=False, encoding="latin-1")
    path = write(tmp_path, '1::2::"caf\u00e9, a:b\n'.encode("latin-1"))
    assert read_columns(path, COLUMNS, dialect)["word"].tolist() == ['"café, a:b']


HEADER = "id,score,word\n"
FAULTS = {
    "empty": ("", "the file is empty"),
    "header only": (HEADER, "no line after the header, wanted lines of 'id,score,word'"),
    "other header": ("id,word\n1,x\n", "line 1: the header is 'id,word', wanted 'id,score,word'"),
    "cut in a number": (HEADER + "1,2,x\n2,3", "line 3: the file ends in mid-line, after '2,3'"),
    "cut in a line": (HEADER + "1,2,x\n2,3\n", "line 3: found 2 fields, '2,3', wanted 3: 'id,"),
    "one too many": (HEADER + "1,2,x,y\n", "line 2: found 4 fields, '1,2,x,y', wanted 3"),
    "blank line": (HEADER + "1,2,x\n\n2,3,y\n", "line 3: found 0 fields"),
    "no integer": (HEADER + "1,2,x\n1.5,2,x\n", "line 3: id is '1.5', wanted int from 0 to"),
    "no number": (HEADER + "1,two,x\n", "line 2: score is 'two', wanted float from 0.5 to 5"),
    "missing number": (HEADER + "1,,x\n", "line 2: score is '', wanted float from 0.5 to 5"),
    "not finite": (HEADER + "1,nan,x\n", "line 2: score is 'nan', wanted float from 0.5 to 5"),
    "out of range": (HEADER + "1,2,x\n1,5.5,x\n", "line 3: score is '5.5', wanted float"),
    "negative": (HEADER + "-1,2,x\n", "line 2: id is '-1', wanted int from 0"),
    "open quote": (HEADER + '1,2,"x\n', "line 2: unexpected end of data, wanted 'id,score,word'"),
    "other encoding": (HEADER.encode() + b"1,2,caf\xe9\n", "line 2: found byte 0xe9, wanted utf-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_names_file_line_and_what_is_wanted(tmp_path, fault):
    text, message = FAULTS[fault]
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_columns(path, COLUMNS, Dialect())


@pytest.mark.parametrize("keep", [0, 15, -9])
def test_cut_off_gzip_names_the_file(tmp_path, keep):
    packed = gzip.compress(b"id,score,word\n" + b"1,2,x\n" * 100)
    path = write(tmp_path, packed[:keep], "file.csv.gz")
    with pytest.raises(ValueError, match=r"file\.csv\.gz: (cut off or not gzip|the file is empty)"):
        read_columns(path, COLUMNS, Dialect())
