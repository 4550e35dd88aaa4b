"""All collectives of sharded tables, counted and named.

Ids and answers travel through process groups of their own, so that neither can meet the other or
the dense part's. Messages of unequal sizes crash gloo or, worse, are taken for one another. So the
ranks *meet* first in a third group, always in 16 bytes per rank: a word that stands for the tag of
what comes, and a status. Ranks that find different words tell one another where they are, in the
same group and so without waiting for a time-out, and raise. After a meeting further messages may
go unannounced as long as every rank knows from it that they come, and in what sizes.
"""

import hashlib
import json
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed import distributed_c10d

from shardwise.ops.lookup import new_result
from shardwise.sharding.environment import Hosts
from shardwise.sharding.faults import describe, is_shared, restore, share, some
from shardwise.sharding.watch import Step, Watch, open_sockets

Lane = Literal["ids", "answers", "meetings"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_TALK = -1  # instead of a tag's word: this rank wants to tell what it has to say
_MARGIN_S = 1.0  # gives up before gloo does, which would break the connections


class Pending:
    """A message on its way."""

    def __init__(self, watch: Watch | None, step: Step, received: Tensor, work: Any) -> None:
        """Remember what is awaited."""
        self._watch, self._step, self._received, self._work = watch, step, received, work

    def wait(self) -> Tensor:
        """Give what the other ranks sent, one rank's after another's.

        Raises:
            RuntimeError: A rank is gone or did not come in time; names it and the collective.
        """
        if self._work is not None and self._watch is not None:
            self._watch.wait(self._work, self._step, can_look=not self._received.is_cuda)
            self._work = None
        return self._received


class Meeting:
    """Ranks that come together."""

    def __init__(self, wire: "Wire", step: Step, message: Pending, error: Exception | None) -> None:
        """Remember what this rank came with."""
        self._wire, self._step, self._message, self._error = wire, step, message, error

    def wait(self) -> list[int]:
        """Give the statuses of all ranks.

        Raises:
            RuntimeError: Ranks came for different things, or one did not come; names them.
            Exception: What a rank came with instead, by its class.
        """
        words, statuses = self._message.wait().T.tolist()
        if len(set(words)) > 1:
            self._wire.disagree(self._step, self._error)
        return list(statuses)


class Wire:
    """Connects the ranks that share tables; all of them make it and call its methods alike.

    Args:
        group: The ranks; None where there is one only.
        name: What it serves, for messages.
        hosts: The ranks of each host, all together those of the group; None: one host.
        timeout_s: How long a rank waits for the others; None takes the group's.

    Attributes:
        rank: This rank within the group.
        world_size: Ranks of the group.
        traffic: Bytes sent to other ranks so far, by tag.
        between_hosts: The part of `traffic` that left this host.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        name: str,
        hosts: Hosts | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make the process groups; every rank must."""
        self.rank = 0 if group is None else dist.get_rank(group)
        self.traffic: Counter[str] = Counter()
        self.between_hosts: Counter[str] = Counter()
        self.watch: Watch | None = None
        self._outer: Wire | None = None
        self._timeout_s = timeout_s if timeout_s is not None or group is None else _timeout(group)
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self._join(group, name, hosts or (tuple(range(len(ranks))),), ranks)
        if group is not None and self.world_size > 1:
            store = distributed_c10d._get_process_group_store(self._groups["meetings"])
            self.watch = Watch(
                None if dist.get_backend(group) == "fake" else store,
                name=name,
                rank=self.rank,
                hosts=self._host_of.tolist(),
                timeout_s=self._timeout_s or 0.0,
            )
            self.watch.sockets |= self._sockets
            weakref.finalize(self, self.watch.stop)

    def _join(
        self, group: dist.ProcessGroup | None, name: str, hosts: Hosts, ranks: list[int]
    ) -> None:
        """Set up what depends on which ranks these are; `ranks` are their global numbers."""
        self.name, self.hosts, self.world_size = name, hosts, len(ranks)
        self._group, self._ranks, self._num_meetings = group, ranks, 0
        self._host_of = torch.empty(self.world_size, dtype=torch.int64)
        for number, host in enumerate(hosts):
            self._host_of[list(host)] = number
        self._is_far = self._host_of != self._host_of[self.rank]
        self._num_far = int(self._is_far.sum())
        self._groups: dict[str, Any] = {}
        self._sockets: set[tuple[int, int]] = set()
        if group is None or self.world_size == 1:
            return
        limit = timedelta(seconds=(self._timeout_s or 0.0) + _MARGIN_S)
        backend = None if dist.get_backend(group) == "fake" else "gloo"
        before = open_sockets()
        for lane in ("ids", "answers", "meetings"):
            self._groups[lane] = dist.new_group(
                ranks,
                timeout=limit,
                backend=backend if lane == "meetings" else None,
                use_local_synchronization=True,
            )
        self._sockets = open_sockets() - before

    def within_host(self) -> "Wire":
        """Connect the ranks of each host; every rank must call this."""
        inner = object.__new__(Wire)
        own = self.hosts[self.host(self.rank)]
        inner.rank, inner._timeout_s = own.index(self.rank), self._timeout_s
        inner.watch = self.watch
        inner.traffic, inner.between_hosts = self.traffic, self.between_hosts
        inner._outer = self  # which stops the watch when it goes
        ranks = [self._ranks[rank] for rank in own]
        inner._join(self._group, f"{self.name} within a host", (tuple(range(len(own))),), ranks)
        if self.watch is not None:
            self.watch.sockets |= inner._sockets
        return inner

    def host(self, rank: int) -> int:
        """Give the number of a rank's host."""
        return int(self._host_of[rank])

    def reset(self) -> None:
        """Begin to count anew."""
        self.traffic.clear()
        self.between_hosts.clear()

    # ---- messages

    def all_to_all(
        self,
        send: Shaped[Tensor, "..."],
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        *,
        tag: str,
        lane: Lane,
        is_agreed: bool = False,
    ) -> Pending:
        """Send a part of a tensor to each rank.

        Args:
            send: The parts, one rank's after another's, along the first dimension.
            send_sizes: Elements of that dimension for each rank.
            receive_sizes: And from each rank.
            tag: What it is and for which tables, for messages and for counting.
            lane: The group to send through.
            is_agreed: The ranks know from an earlier message that this one comes, and need not
                meet before. Ranks that are wrong in this crash.
        """
        if not is_agreed:
            self.meet(tag).wait()
        self._count(send, send_sizes, tag)
        sizes = [list(receive_sizes), list(send_sizes)]
        shape = (sum(sizes[0]), *send.shape[1:])
        received: Tensor = new_result(send, math.prod(shape)).view(shape)
        return self._send(lane, tag, send, received, *sizes)

    def _send(self, lane: Lane, tag: str, send: Tensor, received: Tensor, *sizes: Any) -> Pending:
        """Start an all-to-all; without sizes of equal parts."""
        if self.world_size == 1:
            return Pending(None, Step(0, tag), send, None)
        everyone, own = dist.all_to_all_single, send.contiguous()
        work = self._start(tag, everyone, received, own, *sizes, group=self._groups[lane])
        return Pending(self.watch, Step(self._num_meetings, tag), received, work)

    def _start(self, tag: str, collective: Any, *args: Any, **options: Any) -> Any:
        try:
            return collective(*args, **options, async_op=True)
        except RuntimeError as error:  # connections that broke before
            text = f"rank {self.rank} of {self.world_size}, {self.name}: {tag} failed: {error}"
            raise share(RuntimeError(text)) from error

    def _count(self, send: Tensor, sizes: Sequence[int], tag: str) -> None:
        each = send[:1].numel() * send.element_size() if send.shape[0] else 0
        rows = torch.tensor(sizes)
        self.traffic[tag] += each * int(rows.sum() - rows[self.rank])
        self.between_hosts[tag] += each * int(rows[self._is_far].sum())

    def all_reduce(
        self, tensor: Shaped[Tensor, "..."], *, op: Literal["sum", "max"] = "sum", tag: str
    ) -> Shaped[Tensor, "..."]:
        """Add tensors up, or take the maximum, in place; give the tensor."""
        return self._reach(tag, tensor, dist.all_reduce, _OPS[op])

    def broadcast(
        self, tensor: Shaped[Tensor, "..."], *, source: int, tag: str
    ) -> Shaped[Tensor, "..."]:
        """Take the tensor of one rank, in place; give the tensor."""
        return self._reach(tag, tensor, dist.broadcast, self._ranks[source])

    def _reach(self, tag: str, tensor: Tensor, collective: Any, argument: Any) -> Tensor:
        if self.world_size == 1:
            return tensor
        self.meet(tag).wait()
        lane = "answers" if tensor.is_cuda else "meetings"  # which is gloo's, whatever the others
        work = self._start(tag, collective, tensor, argument, group=self._groups[lane])
        return Pending(self.watch, Step(self._num_meetings, tag), tensor, work).wait()

    # ---- meetings

    def meet(self, tag: str, status: int = 0, error: Exception | None = None) -> Meeting:
        """Come together with all ranks, and exchange a number.

        Args:
            tag: What for; the same on all ranks.
            status: A number for the others.
            error: What to tell them if they came for something else.
        """
        step = Step(self._num_meetings + 1, tag)
        return Meeting(self, step, self._send_word(step, _word(tag), status), error)

    def _send_word(self, step: Step, word: int, status: int) -> Pending:
        self._num_meetings += 1
        if self.watch is not None and self._outer is None:
            self.watch.meetings = self._num_meetings
        words = _words(word, status, self.world_size)
        self.traffic["meetings"] += 16 * (self.world_size - 1)
        self.between_hosts["meetings"] += 16 * self._num_far
        return self._send("meetings", step.tag, words, torch.empty_like(words))

    def gather_texts(self, text: str) -> list[str]:
        """Give the texts of all ranks."""
        self.meet("texts of all ranks").wait()
        return self._gather(text)

    def _gather(self, text: str) -> list[str]:
        """Give the texts of all ranks, once the last of them has come to tell its own."""
        data = text.encode()
        step, words = Step(self._num_meetings, "what other ranks have to say"), [0]
        while set(words) != {_TALK}:  # some had not yet seen that the ranks disagree
            words, sizes = self._send_word(step, _TALK, len(data)).wait().T.tolist()
        flat = torch.tensor(list(data) * self.world_size, dtype=torch.uint8)
        own = [len(data)] * self.world_size
        self._count(flat, own, "meetings")
        received = self._send("meetings", step.tag, flat, flat.new_empty(sum(sizes)), sizes, own)
        return [bytes(part.tolist()).decode() for part in received.wait().split(sizes)]

    # ---- faults

    def disagree(self, step: Step, error: Exception | None) -> NoReturn:
        """Raise on every rank, after ranks have come to one meeting for different things.

        Args:
            step: What this rank has come for.
            error: What it has come with.

        Raises:
            RuntimeError: Names the ranks that are elsewhere than rank 0.
            Exception: A rank's error, if one came with that; see `raise_together`.
        """
        told = [json.loads(text) for text in self._gather(json.dumps([step, describe(error)]))]
        faults = {rank: fault for rank, (_, fault) in enumerate(told) if fault is not None}
        if faults:
            raise restore(faults) from error
        (_, first), _ = told[0]
        others = [
            f"rank {rank} is at {tag!r}" for rank, ((_, tag), _) in enumerate(told) if tag != first
        ]
        text = (
            f"{self.name}: the ranks are at different collectives: rank 0 is at {first!r}, "
            f"{some(others)}; all ranks must use the same collections in the same order"
        )
        if self.watch is not None:
            self.watch.give_up(text)
        raise share(RuntimeError(text))

    def raise_together(self, error: Exception | None) -> NoReturn:
        """Raise on every rank the error of the first rank that has one; every rank must call this.

        Args:
            error: This rank's, if it has one.

        Raises:
            Exception: Of the same class where that is one of Python's own that takes a text, else a
                RuntimeError; names the rank, and in a note the errors of others.
        """
        told = [json.loads(text) for text in self._gather(json.dumps(describe(error)))]
        raise restore({rank: one for rank, one in enumerate(told) if one is not None}) from error

    @contextmanager
    def together(self, tag: str) -> Iterator[None]:
        """Let an error that one rank raises inside be raised on all; every rank must enter.

        Ranks that are in a collective meanwhile leave it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if is_shared(raised):
                raise
            error = raised
        if self.watch is not None:
            self.watch.raised(error)
        try:
            if any(self.meet(f"the end of {tag}", int(error is not None), error).wait()):
                self.raise_together(error)
        except Exception:
            own = describe(error)
            if own is not None and self.watch is not None and self.watch.given_up:
                raise restore({self.rank: own}) from error  # which the others heard from the watch
            raise
        finally:
            if self.watch is not None and not self.watch.given_up:  # else the last may yet ask
                self.watch.raised(None)


@lru_cache(maxsize=1024)
def _word(tag: str) -> int:
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7])


@lru_cache(maxsize=1024)
def _words(word: int, status: int, world_size: int) -> Tensor:
    """The message of a meeting, which is only read."""
    return torch.tensor([[word, status]] * world_size)


def _timeout(group: dist.ProcessGroup) -> float:
    """The time-out of a group, in seconds; torch's default where it has none."""
    kind = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    options = getattr(group._get_backend(torch.device(kind)), "options", None)
    limit: timedelta = getattr(options, "_timeout", dist.constants.default_pg_timeout)
    return limit.total_seconds()
