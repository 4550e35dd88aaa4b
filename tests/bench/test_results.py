import csv

from shardwise.bench.contenders import Tables
from shardwise.bench.grid import CELLS
from shardwise.bench.module import measure
from shardwise.bench.options import Options
from shardwise.bench.results import Results
from shardwise.bench.timing import Times, time_in_turn

WHAT = {"case": "a", "threads": 1}
TIMES = {"shardwise": Times([1.0, 2.0, 3.0]), "peer": Times([4.0, 5.0, 6.0])}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_row_has_median_quartiles_and_ratio_to_ours(tmp_path):
    Results(tmp_path / "a.csv", "ms").add(WHAT, TIMES)
    peer = rows_of(tmp_path / "a.csv")[1]
    assert (peer["value"], peer["quartile1"], peer["quartile3"]) == (
        "5000.0000",
        "4500.0000",
        "5500.0000",
    )
    assert (peer["contender"], peer["ratio_to_ours"], peer["repeats"]) == ("peer", "2.500", "3")


def test_rate_is_bytes_over_median(tmp_path):
    Results(tmp_path / "a.csv", "ms").add_rate(WHAT, Times([1.0, 2.0, 4.0]), 8 * 10**9)
    (row,) = rows_of(tmp_path / "a.csv")
    assert (row["value"], row["unit"]) == ("4.0000", "GB/s")
    assert float(row["quartile1"]) < 4 < float(row["quartile3"])


def test_rows_of_this_commit_are_found_and_others_not(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.bench.results._commit", lambda: "abc")
    results = Results(tmp_path / "a.csv", "ms")
    assert not results.has(WHAT)
    results.add(WHAT, TIMES)
    assert results.has({"case": "a"})
    assert not results.has({"case": "b"})
    monkeypatch.setattr("shardwise.bench.results._commit", lambda: "abd")
    assert not Results(tmp_path / "a.csv", "ms").has(WHAT)


def test_contenders_run_in_turn_and_warmups_do_not_count():
    order, clock = [], iter(range(100))
    runs = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    times = time_in_turn(runs, 2, warmups=1, clock=lambda: float(next(clock)))
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert times["b"].seconds == [1.0, 1.0]


def test_no_cell_of_the_grid_passes_5_gb_per_side():
    assert max(tables.num_bytes for tables, _ in CELLS) < 5e9


def test_lookups_agree_with_those_of_torch_and_are_kept(tmp_path):
    from shardwise.bench.module import Workload

    results = Results(tmp_path / "a.csv", "ms")
    tables = Tables(2, 100, 16, "fp32", "adagrad")
    measure(results, Options((1,), 2), tables, [Workload(8, 3, "zipf")], ["torch"])
    found = {(row["pass"], row["contender"]) for row in rows_of(tmp_path / "a.csv")}
    assert found == {(p, c) for p in ("forward", "train") for c in ("shardwise", "torch")}
