import csv

import pytest
import torch

from shardwise.cli import main


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*options):
    return main(["bench", *options])


def test_bench_adds_rows_that_say_where_they_were_measured(tmp_path, capsys):
    assert run("op", "--quick", "--no-peers", "--threads", "1", "--folder", str(tmp_path)) == 0
    with (tmp_path / "op.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"permute", "regroup", "pairs", "lookup"} <= {row["operation"] for row in rows}
    assert {row["contender"] for row in rows} == {"shardwise"}
    assert rows[0]["torch"] == torch.__version__
    assert str(tmp_path / "op.csv") in capsys.readouterr().out


def test_quick_keeps_nothing_unless_a_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shardwise.cli.bench.RESULTS", tmp_path)
    assert run("step", "--quick", "--no-peers", "--threads", "1") == 0
    assert "model=DLRM" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help_teaches_every_benchmark(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in text for name in ("op", "module", "step", "probe", "grid", "fbgemm-gpu-cpu"))


def test_one_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("op", "--repeats", "1")
    assert "--repeats must be at least 2" in capsys.readouterr().err


def test_picture_is_drawn_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    run("op", "--quick", "--no-peers", "--threads", "1", "--folder", str(tmp_path))
    assert (tmp_path / "op.png").stat().st_size > 0
