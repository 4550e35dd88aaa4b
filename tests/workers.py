"""One pool of worker processes for all tests that need several ranks.

The workers start at the first use and stay; each call sets up a process group of its own among the
first `world_size` of them, so that one call's collectives cannot meet another's. A call that hangs
or kills a worker costs the pool, which the next call starts anew.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One thread each: with more, on a busy 2-core machine, OpenMP threads wait for one another.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
GRACE_S = 10.0  # for the other ranks to answer after one has failed


class Workers:
    """Processes that take turns at being ranks."""

    def __init__(self, num_workers: int = 4) -> None:
        self.num_workers = num_workers
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="shardwise-ranks-")
        self._num_calls = 0

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
    ) -> list[Any]:
        """Call `function(rank, world_size, *args)` on each rank and return the results by rank.

        Args:
            world_size: Number of ranks, at most the number of workers.
            function: Importable by name. Seeded with 0 on every rank.
            *args: Pickled, so each rank has copies of its own.
            timeout_s: When the call is given up: the pool is killed.

        Raises:
            ValueError: More ranks are asked for than there are workers.
            TimeoutError: Some ranks have not answered; their stacks are on stderr.
            Exception: What the first rank to fail raised, with its rank and traceback as a note.
        """
        if not 1 <= world_size <= self.num_workers:
            raise ValueError(f"ranks: from 1 to {self.num_workers} are there, got {world_size}")
        self._start()
        self._num_calls += 1
        store = str(Path(self._folder.name) / str(self._num_calls))
        task = pickle.dumps((function, args))
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pipe.send((rank, world_size, store, timeout_s))
            pipe.send_bytes(task)
        return self._collect(world_size, timeout_s)

    def close(self) -> None:
        """End the workers."""
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        with _environment(ENVIRONMENT):
            for _ in range(self.num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()  # started: its imports do not count as the first call's time

    def _stop(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()
            process.close()
        self._processes, self._pipes = [], []

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        """Wait for all ranks, or after a first failure for as many as answer soon."""
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, BaseException]] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:world_size])}
        deadline = time.monotonic() + timeout_s
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank], error, failed_at = self._answer(rank, pipe)
                if error is not None:
                    failures.append((failed_at, rank, error))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if waiting:
            late = sorted(waiting.values())
            self._dump_stacks(late)
            text = f"ranks {late} of {world_size} gave no answer in {timeout_s:g} s"
            failures.append((time.monotonic(), late[0], TimeoutError(text)))
        if waiting or not all(process.is_alive() for process in self._processes):
            self._stop()
        if failures:
            # The first to fail is the cause: its peers then lose their connection to it.
            _, rank, error = min(failures, key=lambda failure: failure[0])
            error.add_note(f"on rank {rank} of {world_size}")
            raise error
        return [results[rank] for rank in range(world_size)]

    def _answer(self, rank: int, pipe: Connection) -> tuple[Any, BaseException | None, float]:
        """Receive the result of a rank, or what it raised and when."""
        try:
            answer: tuple[Any, BaseException | None, float] = pickle.loads(pipe.recv_bytes())
            return answer
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join()
            text = f"the process of rank {rank} ended with code {process.exitcode}"
            return None, RuntimeError(text), 0.0

    def _dump_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)  # for faulthandler to write


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection) -> None:
    """Answer calls until the other end of the pipe is closed."""
    faulthandler.enable()  # a crash in native code says where
    faulthandler.register(signal.SIGUSR1)
    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            call = pipe.recv()
            pipe.send_bytes(_perform(*call, pipe.recv_bytes()))


def _perform(rank: int, world_size: int, store: str, timeout_s: float, task: bytes) -> bytes:
    """Give the pickled (result, exception, time of the exception) of one call."""
    try:
        function, args = pickle.loads(task)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        return pickle.dumps((function(rank, world_size, *args), None, 0.0))
    except BaseException as error:  # some that matter are no `Exception`: torch's checkpoint errors
        failed_at = time.monotonic()  # one clock for all processes of a machine
        text = traceback.format_exc()
        error.add_note(text)
        with contextlib.suppress(Exception):
            # An exception may pickle and still not come back, so try both ways.
            pickle.loads(answer := pickle.dumps((None, error, failed_at)))
            return answer
        return pickle.dumps((None, RuntimeError(text), failed_at))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
