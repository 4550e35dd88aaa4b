"""Keep the ranks' training loops in step, though their data may end or fail at different times.

With each batch every rank tells the others 16 bytes: it has one, it has none left, or it failed.
This is sent before the batch ahead of it is handed out, and so arrives during that one's step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from torch import nn

from shardwise.optim.slices import owner_of
from shardwise.sharding.wire import Meeting, Wire

T = TypeVar("T")
Connected: TypeAlias = Wire | nn.Module
"""A connection of ranks, or a sharded module, which has one."""

_HAS_ONE, _HAS_NONE, _FAILED = 0, 1, 2
_TAG = "the next batch"


def wire_of(over: Connected) -> Wire:
    """Give the connection of a sharded module.

    Raises:
        ValueError: The module has no sharded tables.
    """
    if isinstance(over, Wire):
        return over
    owners = (owner_of(parameter) for parameter in over.parameters())
    wires = (owner.ranks for owner in owners if owner is not None)
    wire = next((one for one in wires if isinstance(one, Wire)), None)
    if wire is None:
        name = type(over).__name__
        raise ValueError(f"{name} has no sharded tables; shard it first, or give a Wire")
    return wire


def together(over: Connected, tag: str = "the step") -> AbstractContextManager[None]:
    """Let an error that one rank raises inside be raised on all; every rank must enter.

    Ranks that are in a collective meanwhile leave it.

    Args:
        over: The ranks.
        tag: What is done inside, for messages.
    """
    return wire_of(over).together(tag)


@dataclass(frozen=True)
class _Ahead(Generic[T]):
    """A batch that was read, the status of all ranks on its way."""

    batch: T | None
    status: int
    error: Exception | None
    meeting: Meeting


class InStep(Generic[T]):
    """Gives the batches of this rank while every rank has one; see `in_step`.

    Attributes:
        left_over: How many batches each rank had left when all stopped; known at the end. Where
            `len` does not work on the batches, the one that was read is counted.
    """

    def __init__(
        self, batches: Iterable[T], wire: Wire, empty: Callable[[], T] | None = None
    ) -> None:
        """Take the batches; with `empty`, ranks that have none left go on."""
        self.left_over: list[int] = []
        self._batches, self._wire, self._empty = batches, wire, empty

    def __iter__(self) -> Iterator[T]:
        """Give the batches from the beginning."""
        self.left_over = []
        batches, num_given = self._read(), 0
        ahead = self._look_ahead(batches)
        while self._goes_on(ahead):
            now, ahead = ahead, self._look_ahead(batches)
            num_given += now.status == _HAS_ONE
            yield now.batch  # type: ignore[misc]  # is there, as this rank has one or made an empty one
        num_left = self._count(num_given, int(ahead.status == _HAS_ONE))
        self.left_over = self._wire.meet("batches left over", num_left).wait()

    def _read(self) -> Iterator[tuple[T | None, int]]:
        for batch in self._batches:
            yield batch, _HAS_ONE
        while True:
            yield None if self._empty is None else self._empty(), _HAS_NONE

    def _look_ahead(self, batches: Iterator[tuple[T | None, int]]) -> _Ahead[T]:
        batch, error = None, None
        try:
            batch, status = next(batches)
        except Exception as raised:
            status, error = _FAILED, raised
        return _Ahead(batch, status, error, self._wire.meet(_TAG, status, error))

    def _goes_on(self, ahead: _Ahead[T]) -> bool:
        statuses = ahead.meeting.wait()
        if _FAILED in statuses:
            self._wire.raise_together(ahead.error)
        return statuses.count(_HAS_NONE) < (1 if self._empty is None else len(statuses))

    def _count(self, num_given: int, num_read: int) -> int:
        try:
            return len(self._batches) - num_given  # type: ignore[arg-type]  # not all have it
        except TypeError:
            return num_read


def in_step(
    batches: Iterable[T],
    over: Connected,
    when_short: str = "stop",
    empty: Callable[[], T] | None = None,
) -> InStep[T]:
    """Iterate over this rank's batches while the other ranks iterate over theirs.

    One batch is read ahead. An error that reading raises on one rank is raised on all, before the
    step that would have used that batch. All ranks must finish the loop, or leave it after the same
    step.

    Args:
        batches: Those of this rank.
        over: The ranks.
        when_short: When a rank has no batch left: "stop" ends the loop on all ranks and counts what
            the others have left in `InStep.left_over`; "join" goes on until no rank has any, with
            empty batches in place of missing ones.
        empty: Makes an empty batch, for "join".

    Raises:
        ValueError: `when_short` is something else, or "join" without `empty`, or `over` is a module
            without sharded tables.
    """
    if when_short not in ("stop", "join"):
        raise ValueError(f"when_short={when_short!r}: want 'stop' or 'join'")
    if (when_short == "join") != (empty is not None):
        raise ValueError(f"when_short={when_short!r}: 'join' needs `empty`, and only that uses it")
    return InStep(batches, wire_of(over), empty)
