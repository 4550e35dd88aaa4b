"""All collectives of sharded tables, counted and named.

Ids and answers travel through process groups of their own, which every rank makes and uses in one
order, so that neither can meet the other or the dense part's.
"""

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from shardwise.sharding.environment import Hosts

Lane = Literal["ids", "answers"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Pending:
    """A message on its way."""

    def __init__(self, wire: "Wire", tag: str, received: Tensor, work: Any) -> None:
        """Remember what is awaited."""
        self._wire, self._tag, self._received, self._work = wire, tag, received, work

    def wait(self) -> Tensor:
        """Give what the other ranks sent, one rank's after another's.

        Raises:
            RuntimeError: A rank is gone, or did not come in time; names the collective.
        """
        if self._work is not None:
            with self._wire.named(self._tag):
                self._work.wait()
            self._work = None
        return self._received


class Wire:
    """Connects the ranks that share tables.

    Args:
        group: The ranks; None where there is one only.
        name: What it serves, for messages.
        hosts: The ranks of each host, all together those of the group; None: one host.

    Attributes:
        rank: This rank within the group.
        world_size: Ranks of the group.
        traffic: Bytes sent to other ranks so far, by tag.
        between_hosts: The part of `traffic` that left this host.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, name: str, hosts: Hosts | None = None
    ) -> None:
        """Make the process groups; every rank must."""
        self.name = name
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.hosts: Hosts = hosts or (tuple(range(self.world_size)),)
        self._host_of = torch.empty(self.world_size, dtype=torch.int64)
        for number, host in enumerate(self.hosts):
            self._host_of[list(host)] = number
        self._is_far = self._host_of != self._host_of[self.rank]
        self._ranks = [] if group is None else dist.get_process_group_ranks(group)
        self._groups: dict[Lane, Any] = {}
        if self.world_size > 1:
            self._groups = {"ids": self._new_group(self._ranks)}
            self._groups["answers"] = self._new_group(self._ranks)
        self.traffic: Counter[str] = Counter()
        self.between_hosts: Counter[str] = Counter()

    @staticmethod
    def _new_group(ranks: Sequence[int]) -> Any:
        return dist.new_group(list(ranks), use_local_synchronization=True)

    def host(self, rank: int) -> int:
        """Give the number of a rank's host."""
        return int(self._host_of[rank])

    def within_host(self) -> "Wire":
        """Connect the ranks of each host; every rank must call this."""
        inner = object.__new__(Wire)
        own = self.hosts[self.host(self.rank)]
        inner.name, inner.rank, inner.world_size = self.name, own.index(self.rank), len(own)
        inner.hosts = (tuple(range(len(own))),)
        inner._host_of = torch.zeros(len(own), dtype=torch.int64)
        inner._is_far = inner._host_of != 0
        inner._ranks = [self._ranks[rank] for rank in own]
        inner._groups = {}
        if len(own) > 1:
            inner._groups = {"ids": self._new_group(inner._ranks)}
            inner._groups["answers"] = self._new_group(inner._ranks)
        inner.traffic, inner.between_hosts = self.traffic, self.between_hosts
        return inner

    def reset(self) -> None:
        """Begin to count anew."""
        self.traffic.clear()
        self.between_hosts.clear()

    @contextmanager
    def named(self, tag: str) -> Iterator[None]:
        """Let an error of a collective name it."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size}, {self.name}: {tag} failed: {error}"
            ) from error

    # ---- messages

    def all_to_all(
        self,
        send: Shaped[Tensor, "..."],
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        *,
        tag: str,
        lane: Lane,
    ) -> Pending:
        """Send a part of a tensor to each rank.

        Args:
            send: The parts, one rank's after another's, along the first dimension.
            send_sizes: Elements of that dimension for each rank.
            receive_sizes: And from each rank.
            tag: What it is, for messages and for counting.
            lane: The group to send through.
        """
        if self.world_size == 1:
            return Pending(self, tag, send, None)
        self._count(send, send_sizes, tag)
        received = send.new_empty(sum(receive_sizes), *send.shape[1:])
        with self.named(tag):
            work = dist.all_to_all_single(
                received,
                send.contiguous(),
                list(receive_sizes),
                list(send_sizes),
                group=self._groups[lane],
                async_op=True,
            )
        return Pending(self, tag, received, work)

    def _count(self, send: Tensor, sizes: Sequence[int], tag: str) -> None:
        each = send[:1].numel() * send.element_size() if send.shape[0] else 0
        rows = torch.tensor(sizes)
        self.traffic[tag] += each * int(rows.sum() - rows[self.rank])
        self.between_hosts[tag] += each * int(rows[self._is_far].sum())

    def all_reduce(
        self, tensor: Shaped[Tensor, "..."], *, op: Literal["sum", "max"] = "sum", tag: str
    ) -> Shaped[Tensor, "..."]:
        """Add tensors up, or take the maximum, in place; give the tensor."""
        if self.world_size > 1:
            with self.named(tag):
                dist.all_reduce(tensor, _OPS[op], group=self._groups["answers"])
        return tensor

    def broadcast(
        self, tensor: Shaped[Tensor, "..."], *, source: int, tag: str
    ) -> Shaped[Tensor, "..."]:
        """Take the tensor of one rank, in place; give the tensor."""
        if self.world_size > 1:
            with self.named(tag):
                dist.broadcast(tensor, self._ranks[source], group=self._groups["answers"])
        return tensor

    def gather_texts(self, text: str) -> list[str]:
        """Give the texts of all ranks."""
        return [part.decode() for part in self._gather(text.encode())]

    def _gather(self, data: bytes) -> list[bytes]:
        """Give the bytes of all ranks."""
        if self.world_size == 1:
            return [data]
        ones, tag = [1] * self.world_size, "texts of all ranks"
        size = torch.full((self.world_size,), len(data))
        sizes: list[int] = self.all_to_all(size, ones, ones, tag=tag, lane="ids").wait().tolist()
        flat = torch.frombuffer(
            bytearray(data) * self.world_size or bytearray(1), dtype=torch.uint8
        )
        flat = flat[: len(data) * self.world_size]
        own = [len(data)] * self.world_size
        received = self.all_to_all(flat, own, sizes, tag=tag, lane="ids").wait()
        return [bytes(part.tolist()) for part in received.split(sizes)]

    # ---- faults

    def raise_together(self, error: BaseException | None) -> NoReturn:
        """Raise on every rank the error of the first rank that has one; every rank must call this.

        Args:
            error: This rank's, if it has one.

        Raises:
            Exception: Of the same class where that is one of Python's own that takes a text, else a
                RuntimeError; names the rank, and in a note the errors of others.
        """
        said = (type(error).__name__, _text(error)) if error is not None else None
        every = [pickle.loads(part) for part in self._gather(pickle.dumps(said))]
        found = [(rank, *one) for rank, one in enumerate(every) if one is not None]
        rank, name, text = found[0]
        kind = _KINDS.get(name, RuntimeError)
        own = kind(f"rank {rank}: {text}")
        for other, _, its_text in found[1:]:
            own.add_note(f"and rank {other}: {its_text}")
        raise own from error

    @contextmanager
    def together(self, tag: str) -> Iterator[None]:
        """Let an error that one rank raises inside be raised on all; every rank must enter."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = torch.tensor(int(error is not None))
        if int(self.all_reduce(failed, op="max", tag=f"status of {tag}")):
            self.raise_together(error)


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (IndexError, KeyError, ValueError, TypeError, RuntimeError, MemoryError, OSError)
}


def _text(error: BaseException) -> str:
    is_key = isinstance(error, KeyError) and error.args
    return str(error.args[0]) if is_key else str(error) or type(error).__name__
