"""Time several contenders in turn, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of each run of one contender."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The ends of the middle half."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def time_in_turn(
    contenders: Mapping[str, Callable[[int], object]],
    repeats: int,
    warmups: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Run every contender once, then every one again, and so on, each round another one first.

    Who comes second finds in the cache what both read.

    Args:
        contenders: Functions by name, called with the number of the round.
        repeats: Rounds that count, at least 2.
        warmups: Rounds before them that do not.
        clock: Gives seconds; `time.process_time` those of all threads' processor.

    Returns:
        The times by name, in the order of `contenders`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warmups + repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            contenders[name](i)
            elapsed = clock() - start
            if i >= warmups:
                seconds[name].append(elapsed)
    return {name: Times(each) for name, each in seconds.items()}
