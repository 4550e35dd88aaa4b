"""Let Ctrl-C and SIGTERM end a loop between two steps, instead of in the middle of one."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that ask a run to end; a run that they ended has the status 128 and their number."""


@contextmanager
def noted_signals(then: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Give a list that the first signal is put into; a second one ends the process as usual.

    Only the main thread may enter it.

    Args:
        then: What else to do with the first one.
    """
    noted: list[int] = []
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        noted.append(number)
        if then is not None:
            then(number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
