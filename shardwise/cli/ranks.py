"""The processes that train together: who they are, and what they tell one another."""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from shardwise.sharding.wire import Wire

_PATIENCE_S = 600.0
"""How long the first process waits for all others to be started."""


class Ranks:
    """The processes that train together; of a single one all methods are free.

    Args:
        wire: Connects them; None: this process is alone.

    Attributes:
        rank: The number of this one.
        count: How many there are.
        wire: Their connection.
    """

    def __init__(self, wire: Wire | None = None) -> None:
        """Take their connection."""
        self.wire = wire
        self.rank = 0 if wire is None else wire.rank
        self.count = 1 if wire is None else wire.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that shows the run and writes what all have in common."""
        return self.rank == 0

    def together(self, what: str) -> AbstractContextManager[None]:
        """Let an error that one process raises inside be raised on all; also wait for all."""
        return nullcontext() if self.wire is None else self.wire.together(what)

    def largest(self, number: int, what: str) -> int:
        """Give the largest of the numbers of all processes."""
        return number if self.wire is None else max(self.wire.meet(what, number).wait())

    def gather(
        self, rows: Shaped[Tensor, "..."], sizes: Sequence[int], what: str
    ) -> Shaped[Tensor, "..."]:
        """Join the rows of all processes, in their order.

        Args:
            rows: Those of this one.
            sizes: How many each has.
            what: For messages.
        """
        if self.wire is None:
            return rows
        copies = rows.repeat(self.count, *[1] * (rows.dim() - 1))
        own = [sizes[self.rank]] * self.count
        # The ranks go the same way; one that does not says why, and the others hear it here.
        sent = self.wire.all_to_all(copies, own, sizes, tag=what, lane="answers", is_agreed=True)
        return sent.wait()

    def gather_uneven(self, rows: Shaped[Tensor, "..."], what: str) -> Shaped[Tensor, "..."]:
        """Join the rows of all processes, which do not know how many each has."""
        ones, number = [1] * self.count, torch.tensor([rows.shape[0]])
        return self.gather(rows, self.gather(number, ones, what).tolist(), what)


def has_launcher() -> bool:
    """Say whether torchrun, or what sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_restarts() -> int:
    """Give how often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of the launcher, or take those of torch.distributed if it is set up."""
    if dist.is_initialized():
        yield _all_ranks()
    elif has_launcher():
        store, rank, count = next(rendezvous("env://"))
        fresh = _unused(store, rank, count)
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=count)
        try:
            yield _all_ranks()
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()


def _all_ranks() -> Ranks:
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is initialised"
    return Ranks(Wire(group, name="shardwise train") if group.size() > 1 else None)


def _unused(store: Store, rank: int, count: int) -> Store:
    """Give a part of the launcher's store that no earlier start of its processes has written to.

    torchrun keeps one store through all of them, where addresses of processes that are gone would
    be taken for those of their heirs. So each rank asks under a number drawn anew, and the first
    answers it with the name of the part, until all have heard.
    """
    drawn = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asked by {rank}", drawn)
        name = store.get(f"answer to {drawn}").decode()
        store.set(f"{name} heard by {rank}", "")
        return PrefixStore(name, store)
    waiting, deadline = set(range(1, count)), time.monotonic() + _PATIENCE_S
    while waiting:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} of {count} did not come; start them all")
        for other in waiting:
            if store.check([f"asked by {other}"]):
                store.set(f"answer to {store.get(f'asked by {other}').decode()}", drawn)
        waiting = {one for one in waiting if not store.check([f"{drawn} heard by {one}"])}
        time.sleep(0.01)
    return PrefixStore(drawn, store)
