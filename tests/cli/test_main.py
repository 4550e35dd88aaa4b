import subprocess
import sys

import pytest

from shardwise.cli import main
from shardwise.sharding.faults import share


@pytest.mark.parametrize("package", ["cattrs", "tqdm", "tyro"])
def test_missing_extra_is_named(monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.startswith("shardwise.cli.")]:
        if name != "shardwise.cli.checks":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "run.toml"]) == 1
    error = capsys.readouterr().err
    assert f"train needs {package}, which is not installed: pip install shardwise[train]" in error


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "train CONFIG.toml" in shown
    assert "evaluate CONFIG.toml --checkpoint DIR" in shown


def test_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_module_is_the_command():
    command = [sys.executable, "-m", "shardwise", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("shardwise 0.")


@pytest.mark.parametrize("rank", ["0", "1", "2"])
def test_fault_of_one_rank_is_shown_by_the_first_and_its_traceback_there(monkeypatch, capsys, rank):
    def fail(command, options):
        raise share(RuntimeError("rank 2: something broke"))

    monkeypatch.setattr("shardwise.cli._run", fail)
    monkeypatch.setenv("RANK", rank)
    if rank == "2":
        with pytest.raises(RuntimeError, match="something broke"):
            main(["train", "run.toml"])
    else:
        assert main(["train", "run.toml"]) == 1
    shown = {"0": "shardwise: error: rank 2: something broke\n"}
    assert capsys.readouterr().err == shown.get(rank, "")


def test_ctrl_c_before_the_first_step_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(command, options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwise.cli._run", interrupted)
    assert main(["train", "run.toml"]) == 1
    assert capsys.readouterr().err == "shardwise: error: interrupted\n"
