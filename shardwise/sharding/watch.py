"""What each rank is doing, so that a collective that fails or hangs can say who is missing.

A rank that waits in vain raises an alarm in the store that the process group was set up with. A
thread of each rank looks for it, some times within the time-out, and answers with where its rank
is: this works for ranks that compute, sleep or wait elsewhere. One that does not answer has ended
or is cut off. While all goes well, a rank's thread asks the store one thing every few seconds, and
a collective costs two assignments. Only that thread uses the store, which may itself be cut off.
"""

import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch.distributed.distributed_c10d import Store

from shardwise.sharding.faults import Fault, describe, restore, share, some

State: TypeAlias = dict[str, Any]
_ALARM = "alarm"
_GIVEN_UP = "gave up"


# All of this process, as a rank that does not come may wait among others.
_watches: "weakref.WeakValueDictionary[int, Watch]" = weakref.WeakValueDictionary()


class Step(NamedTuple):
    """A collective.

    Attributes:
        number: How many meetings of its ranks came before it.
        tag: What it is, and for which tables.
    """

    number: int
    tag: str


class Watch:
    """Keeps what this rank does, and asks the others.

    Args:
        store: Reached by all ranks; None where ranks cannot be asked.
        name: What the ranks do together, for messages.
        rank: This rank.
        hosts: The host of each rank.
        timeout_s: How long to wait for the other ranks.

    Attributes:
        waits: The collective this rank waits for.
        last: The last that it has waited for.
        fault: What this rank has raised and the others have not yet heard of.
        meetings: How many meetings this rank has gone to.
        given_up: Why this rank can go on no more; nothing while it can.
        sockets: Those of the process groups, as `open_sockets` gives them.
    """

    def __init__(
        self, store: Store | None, *, name: str, rank: int, hosts: list[int], timeout_s: float
    ) -> None:
        """Start the thread."""
        self.name, self.rank, self.timeout_s = name, rank, timeout_s
        self.waits: Step | None = None
        self.last: Step | None = None
        self.fault: Fault | None = None
        self.meetings = 0
        self._hosts, self._since = hosts, time.monotonic()
        self.given_up = ""
        self._ended = ""
        self.sockets: set[tuple[int, int]] = set()
        self._heard: dict[int, State] = {}
        self._is_alarmed = False
        self._wants_answers = False
        self._stopped, self._woken = threading.Event(), threading.Event()
        self._interval_s = min(max(timeout_s / 20, 0.05), 2.0)
        _watches[id(self)] = self
        self._thread: threading.Thread | None = None
        if store is not None:
            self._store = store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
            self._store.set_timeout(timedelta(seconds=5))
            name = f"watch of {name}"
            self._thread = threading.Thread(target=self._look_out, name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Tell the other ranks, should they ask, that this one has ended."""
        error = getattr(sys, "last_value", None)  # what the interpreter ends with
        self._ended = f"after {type(error).__name__}: {error}" if error else "without an error"
        self._stopped.set()
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    # ---- waiting

    def wait(self, work: Any, step: Step, *, can_look: bool) -> None:
        """Wait until a collective is done.

        Args:
            work: As `torch.distributed` gave it.
            step: Which it is.
            can_look: Whether `work` takes a time to wait; else it waits as long as it likes.

        Raises:
            RuntimeError: It failed, was waited for too long, or another rank gave up; says which
                ranks are missing and where they are.
            Exception: What another rank raised meanwhile, by its class, with its rank.
        """
        if self.given_up:
            raise share(RuntimeError(f"{self.given_up}; make the process groups anew"))
        self.waits, self.last = step, step
        started = self._since = time.monotonic()
        try:
            if can_look:
                self._wait_and_look(work)
            else:
                work.wait()
        except (RuntimeError, TimeoutError) as error:
            explained = self._explain(step, time.monotonic() - started, str(error))
            self.waits = None
            raise explained from error
        self.waits, self._since = None, time.monotonic()

    def _wait_and_look(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                work.wait(timedelta(seconds=min(0.5, self.timeout_s / 8)))
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what went wrong, or it was done at the last moment
                    return
            if self._is_alarmed:
                self._wants_answers = True
                if self._faults() or any(_GIVEN_UP in state for state in self._heard.values()):
                    raise TimeoutError("another rank failed")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {self.timeout_s:g} s")

    # ---- telling and asking

    def raised(self, error: Exception | None) -> None:
        """Let ranks that wait for this one hear what it raised; None: they have heard."""
        self.fault = describe(error)
        if self.fault is not None:
            self._woken.set()

    def give_up(self, text: str) -> None:
        """Note that this rank has left a collective which others may wait in: for good."""
        self.given_up = self.given_up or text
        self._woken.set()

    def _state(self) -> State:
        state: State = {"for_s": round(time.monotonic() - self._since, 1), "process": os.getpid()}
        elsewhere = (
            other.waits for ref in _watches.valuerefs() if (other := ref()) and other.waits
        )
        waits = self.waits or (self.last if self.given_up else None)
        waits = waits or next((Step(-1, step.tag) for step in elsewhere), None)
        for name, step in (("waits", waits), ("last", self.last)):
            if step is not None:
                state[name] = list(step)
        if self.fault is not None:
            state["fault"] = self.fault | {"meeting": str(self.meetings)}
        if self.given_up:
            state[_GIVEN_UP] = True
        if self._ended:
            state["ended"] = self._ended
        return state

    def _look_out(self) -> None:
        """Look for an alarm, and answer; raise one when this rank has to."""
        with contextlib.suppress(Exception):  # the store is gone: nobody can be asked any more
            while not self._stopped.is_set():
                self._woken.wait(self._interval_s)
                self._woken.clear()
                if self.given_up or self.fault is not None:
                    self._store.set(_ALARM, "1")
                if self._store.check([_ALARM]):
                    self._answer()
            self._store.set(str(self.rank), json.dumps(self._state()))

    def _answer(self) -> None:
        self._store.set(str(self.rank), json.dumps(self._state()))
        if self._wants_answers or self.given_up:
            ranks = [rank for rank in range(len(self._hosts)) if rank != self.rank]
            if not self._store.check([str(rank) for rank in ranks]):
                ranks = [rank for rank in ranks if self._store.check([str(rank)])]
            states = self._store.multi_get([str(rank) for rank in ranks])
            self._heard = {
                rank: json.loads(state) for rank, state in zip(ranks, states, strict=True)
            }
        self._is_alarmed = True

    # ---- saying what is wrong

    def _faults(self) -> dict[int, Fault]:
        """What other ranks raised that this one has not heard of in a meeting since."""
        found = {rank: state["fault"] for rank, state in self._heard.items() if "fault" in state}
        return {rank: one for rank, one in found.items() if int(one["meeting"]) >= self.meetings}

    def _explain(self, step: Step, waited_s: float, cause: str) -> Exception:
        """Ask all ranks where they are, and give the error that says so."""
        head = f"rank {self.rank} of {len(self._hosts)}, {self.name}: {step.tag} failed"
        self.give_up(f"{head} before")
        others = [rank for rank in range(len(self._hosts)) if rank != self.rank]
        if self._thread is not None:
            # As long as it takes busy ranks to look at the store twice.
            deadline = time.monotonic() + 2 * self._interval_s + 1.0
            while len(self._heard) < len(others) and time.monotonic() < deadline:
                self._woken.set()
                time.sleep(0.05)
        _hang_up(self.sockets)
        faults = self._faults()
        if faults:
            error = restore(faults)
            error.add_note(f"{head} therefore")
            return error
        said = [text for rank in others if (text := self._say(rank, step))]
        missing = some(said) or "all other ranks wait there, too: their network may be cut"
        if not self._is_alarmed:
            missing += "; no rank could be asked, as the process group's store does not answer"
        return share(RuntimeError(f"{head} after {waited_s:.1f} s: {missing} ({cause})"))

    def _say(self, rank: int, step: Step) -> str:
        """Say why a rank is not where this one waits; nothing where it is."""
        state = self._heard.get(rank)
        who = f"rank {rank}"
        if state is None:
            host = f" on host {self._hosts[rank]}" if len(set(self._hosts)) > 1 else ""
            return f"{who}{host} gives no sign of life: it has ended, or is cut off"
        if "ended" in state:
            return f"{who} has ended {state['ended']}"
        if "waits" in state:
            number, tag = state["waits"]
            if tag == step.tag and number == step.number:
                return ""
            meetings = f" (meeting {number}, here {step.number})" if number >= 0 else ""
            return f"{who} waits for {tag} instead{meetings}"
        before = f"; its last was {state['last'][1]}" if "last" in state else ""
        return (
            f"{who} has not come: since {state['for_s']} s its process {state['process']} is in no "
            f"collective{before}"
        )


def open_sockets() -> set[tuple[int, int]]:
    """Give (file descriptor, inode) of this process's sockets, as far as the system tells."""
    found = set()
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            status = entry.stat()
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(entry.name), status.st_ino))
    return found


def _hang_up(sockets: set[tuple[int, int]]) -> None:
    """Break the connections of groups that are given up.

    gloo has no way to leave a collective: the end of the process would wait for it to time out.
    """
    # The inode tells a descriptor that was used again from the old one.
    for number, _ in sockets & open_sockets():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                connection.shutdown(socket.SHUT_RDWR)
