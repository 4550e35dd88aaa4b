import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli.launch import launch

# One write for a line: those of several processes may else mix within it.
SHOW = """
words = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
print(" ".join(words) + "\\n", end="")
"""


def run(code: str, count: int = 2) -> int:
    return launch(count, [sys.executable, "-c", f"import os, signal, sys, time\n{code}"])


def test_processes_know_who_they_are(capfd):
    assert run(SHOW, 3) == 0
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "0 0 3", "1 1 3", "2 2 3"]


def test_processes_meet_at_a_store(capfd):
    meet = "from torch import distributed as d; d.init_process_group('gloo'); d.barrier()"
    assert run(meet + "; print(str(d.get_rank()) + ' ', end='')") == 0
    assert sorted(capfd.readouterr().out.split()) == ["0", "1"]


def test_failure_of_one_ends_all(monkeypatch, capfd):
    monkeypatch.setattr("shardwise.cli.launch._GRACE_S", 0.1)
    before = time.monotonic()
    assert run("sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)") == 3
    assert time.monotonic() - before < 30
    error = "shardwise: error: the process of rank 1 ended with status 3, and the others with it\n"
    assert capfd.readouterr().err == error


def test_signal_that_ended_one_is_named(monkeypatch, capfd):
    monkeypatch.setattr("shardwise.cli.launch._GRACE_S", 0.1)
    kill = "os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run(kill) == 128 + 9
    assert "rank 0 ended with signal SIGKILL" in capfd.readouterr().err


def test_ctrl_c_reaches_all(capfd):
    wait = "signal.signal(signal.SIGINT, lambda *_: os.write(1, b'stop\\n') and os._exit(1))"
    wake = "os.environ['RANK'] == '0' and (time.sleep(1), os.kill(os.getppid(), signal.SIGINT))"
    assert run(f"{wait}; {wake}; time.sleep(60)") == 1
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("stop\nstop\n", "")


def test_processes_end_with_their_launcher(tmp_path):
    child = (
        "import os, pathlib, time; from shardwise.cli.launch import end_with_launcher;"
        f"end_with_launcher(); pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch();"
        "time.sleep(60)"
    )
    start = f"launch(2, [sys.executable, '-c', {child!r}])"
    parent = f"import sys; from shardwise.cli.launch import launch; {start}"
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    await_that(lambda: len(list(tmp_path.iterdir())) == 2)
    launcher.kill()
    launcher.wait()
    await_that(lambda: not any(is_running(int(path.name)) for path in tmp_path.iterdir()))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def await_that(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
