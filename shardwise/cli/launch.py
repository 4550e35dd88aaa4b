"""Run a command in several processes of this machine: a small torchrun.

The processes get torchrun's environment variables and meet over 127.0.0.1. They end together: when
one fails the others are ended, and when this process is gone they end by themselves. Signals that
ask this process to end reach each of them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch hides it

from shardwise.cli.interrupt import noted_signals

_GRACE_S = 10.0
"""Seconds that the others have after one process failed: they tell why, or end unharmed."""

_POLL_S = 0.05
_IS_CHILD = "SHARDWISE_LAUNCHED"


def launch(num_processes: int, command: Sequence[str]) -> int:
    """Run a command in processes; give the exit status.

    The first Ctrl-C or SIGTERM reaches each process as one, a second one ends them.

    Args:
        num_processes: How many.
        command: What each runs: a program and its arguments.

    Returns:
        0, or the status of the first process found that did not end with 0: of one that a signal
        has ended, 128 and its number.
    """
    # The store lives here, at a port of the system's choice, as torchrun's does in its agent.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _started(num_processes, store.port, command) as processes:

        def pass_on(number: int) -> None:
            for process in processes:
                process.send_signal(number)

        with noted_signals(pass_on) as noted:
            failed = _await(processes)
            if failed is None:
                return 0
            _settle(processes)
        status = processes[failed].returncode
        if not noted and (status < 0 or processes[0].poll() != status):
            print(f"shardwise: error: {_describe(failed, status)}", file=sys.stderr)
        return status if status > 0 else 128 - status


def end_with_launcher() -> None:
    """In a process that `launch` started: end when the launcher is gone, however it ended."""
    if os.environ.get(_IS_CHILD):
        Thread(target=_await_launcher, daemon=True).start()


def _await_launcher() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the other end is closed
    os._exit(1)


@contextmanager
def _started(
    count: int, port: int, command: Sequence[str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the processes; none is left at the end."""
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        _IS_CHILD: "1",
    }
    common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            processes.append(
                subprocess.Popen(
                    command,
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    start_new_session=True,  # the terminal's Ctrl-C comes to this process alone
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _await(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended well, or give the first one found that has not."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed or None not in statuses:
            return failed[0] if failed else None
        time.sleep(_POLL_S)


def _settle(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the others a while to end."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_S)


def _describe(rank: int, status: int) -> str:
    end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"the process of rank {rank} ended with {end}, and the others with it"
