"""What is asked of every benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        threads: Numbers of torch's threads, each measured.
        repeats: Rounds that count; their median is reported.
        quick: Small sizes, only to see that it runs.
        peers: Whether others are measured beside us, where they can be imported.
    """

    threads: tuple[int, ...] = (1, 2)
    repeats: int = 12
    quick: bool = False
    peers: bool = True
