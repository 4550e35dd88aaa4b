"""Let Ctrl-C end a loop between two steps, instead of in the middle of one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Event]:
    """Give an event that the first SIGINT sets; a second one ends the process as usual.

    Only the main thread may enter it.
    """
    event, previous = Event(), signal.getsignal(signal.SIGINT)

    def restore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)

    def note(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        restore()
