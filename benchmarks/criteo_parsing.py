"""Parsing of Criteo's raw TSV on one core, beside pandas and a row-wise Python loader.

All read the same file of generated rows and end with the same numbers: labels, 13 integers and 26
ids, missing ones 0. pandas (where it can be imported) reads it by its C parser and turns the hex
columns to integers one by one; the Python loader splits each line and calls `int` on each field.
The process is held to one core. Printed are seconds a file, and rows a second. With --write, rows
of results go to benchmarks/results/criteo_parsing.csv.
"""

import argparse
import importlib
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # read when polars is imported

import numpy as np

from shardwise.bench.results import OURS, RESULTS, Results
from shardwise.bench.timing import time_in_turn
from shardwise.data import CriteoReader


def main() -> None:
    """Read the options, and time all loaders in turn on one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=200_000, help="of the generated file")
    add("--file", type=Path, help="a raw file to read in its place")
    add("--repeats", type=int, default=10, help="rounds; the median is reported")
    add("--write", action="store_true", help="add rows to the CSV file")
    add("--quick", action="store_true", help="2,000 rows, 3 rounds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.repeats = 2000, 3
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = Results(RESULTS / "criteo_parsing.csv" if options.write else None, "ms")
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or write_rows(Path(folder) / "train.txt", options.rows)
        loaders = find_loaders()
        sums = {name: checksum(load(path)) for name, load in loaders.items()}
        assert len(set(sums.values())) == 1, f"the loaders disagree: {sums}"
        num_rows = len(load_ours(path))
        runs: dict[str, Callable[[int], object]] = {
            name: lambda _, load=load: load(path) for name, load in loaders.items()
        }
        times = time_in_turn(runs, options.repeats, warmups=1)
    results.add(
        {"rows": num_rows, "source": "file" if options.file else "generated", "threads": 1}, times
    )
    for name, each in times.items():
        print(f"  {name:24} {num_rows / each.median:12,.0f} rows/s")


def write_rows(path: Path, count: int) -> Path:
    """Write rows with about as many missing fields as the Kaggle set has."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            numbers = [str(int(draw.expovariate(0.01)) - 2) for _ in range(13)]
            ids = [f"{draw.getrandbits(32):08x}" for _ in range(26)]
            fields = ["" if draw.random() < 0.13 else field for field in numbers + ids]
            file.write("\t".join([str(int(draw.random() < 0.25)), *fields]) + "\n")
    return path


def load_ours(path: Path) -> np.ndarray:
    """Read by columns, block by block."""
    blocks = [np.column_stack([r.labels, r.dense, r.sparse]) for r in CriteoReader([path])]
    return np.concatenate(blocks)


def load_by_pandas(path: Path) -> np.ndarray:
    """Read by columns, the whole file at once."""
    pandas: Any = importlib.import_module("pandas")
    kinds = dict.fromkeys(range(14), "float64") | dict.fromkeys(range(14, 40), "str")
    frame = pandas.read_csv(path, sep="\t", header=None, dtype=kinds, keep_default_na=True)
    numbers = frame[list(range(14))].fillna(0).astype("int64").to_numpy()
    ids = [frame[i].fillna("0").map(lambda field: int(field, 16)) for i in range(14, 40)]
    return np.column_stack([numbers, *ids])


def load_by_rows(path: Path) -> np.ndarray:
    """Read line by line."""
    rows = []
    with path.open() as file:
        for line in file:
            fields = line.rstrip("\n").split("\t")
            numbers = [int(field) if field else 0 for field in fields[:14]]
            rows.append(numbers + [int(field, 16) if field else 0 for field in fields[14:]])
    return np.array(rows)


def find_loaders() -> dict[str, Callable[[Path], np.ndarray]]:
    """Give the loaders by name; says so where pandas cannot be imported."""
    loaders = {OURS: load_ours, "pandas": load_by_pandas, "python": load_by_rows}
    try:
        importlib.import_module("pandas")
    except ImportError as error:
        print(f"without pandas: {error}")
        del loaders["pandas"]
    return loaders


def checksum(rows: np.ndarray) -> int:
    """Give a number that differs if any field does, almost surely."""
    weights = np.random.default_rng(0).integers(1, 2**20, rows.shape[1])
    places = np.arange(1, len(rows) + 1)
    return int((rows @ weights * places).sum())


if __name__ == "__main__":
    main()
