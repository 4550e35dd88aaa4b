"""Look back from many moments at once, at what had happened strictly before each.

All features of the past are made of `EarlierEvents`, so that "nothing from the rated moment or
after it" is decided in one place. Work is by sorting and prefix sums; there is no loop over rows.
"""

import numpy as np
from jaxtyping import Float64, Int64, Num

_GRID = 2.0**20


class EarlierEvents:
    """For each query, the events of its group with a time strictly before the query's own.

    Events at the same moment as a query are not seen by it, whichever comes first in the file.

    Args:
        event_groups: Whose event it is; at least 0.
        event_times: When it happened, in any unit.
        groups: Whose past each query asks for. By default the events are the queries.
        times: The moments of the queries, in the same unit.
    """

    def __init__(
        self,
        event_groups: Int64[np.ndarray, " events"],
        event_times: Int64[np.ndarray, " events"],
        groups: Int64[np.ndarray, " queries"] | None = None,
        times: Int64[np.ndarray, " queries"] | None = None,
    ) -> None:
        groups = event_groups if groups is None else groups
        times = event_times if times is None else times
        # Ranks in place of times: group and time then share one sortable 64-bit key.
        moments = np.unique(np.concatenate([event_times, times]))
        keys = event_groups * len(moments) + np.searchsorted(moments, event_times)
        self._order = np.argsort(keys, kind="stable")
        keys = keys[self._order]
        first_keys = groups * len(moments)
        self._start = np.searchsorted(keys, first_keys)
        self._stop = np.searchsorted(keys, first_keys + np.searchsorted(moments, times))

    @property
    def counts(self) -> Int64[np.ndarray, " queries"]:
        """The number of earlier events of each query."""
        return np.asarray(self._stop - self._start)

    def sums(
        self, values: Num[np.ndarray, " events"], last: int | None = None
    ) -> Float64[np.ndarray, " queries"]:
        """Add up a value over the earlier events of each query; 0 where there are none.

        Values are rounded to multiples of 2**-20, which makes the prefix sums exact (up to 2**33):
        otherwise a later event of another group could still reach a sum by its rounding.

        Args:
            values: One per event, in the order the events were given.
            last: Add up at most this many, the latest ones.
        """
        prefix = np.zeros(len(values) + 1)
        np.cumsum(np.rint(values[self._order] * _GRID), out=prefix[1:])
        start = self._start if last is None else np.maximum(self._start, self._stop - last)
        return np.asarray((prefix[self._stop] - prefix[start]) / _GRID)

    def bags(self, last: int) -> tuple[Int64[np.ndarray, " picked"], Int64[np.ndarray, " queries"]]:
        """Pick the latest earlier events of each query, oldest first.

        Args:
            last: At most this many per query.

        Returns:
            The events' positions, query after query, and how many each query has.
        """
        lengths = np.minimum(self.counts, last)
        return self._order[concatenated_ranges(self._stop - lengths, lengths)], lengths

    def edges(self) -> tuple[Int64[np.ndarray, " queries"], Int64[np.ndarray, " queries"]]:
        """Give the positions of each query's first and latest earlier event; -1 where none."""
        if len(self._order) == 0:
            none = np.full(len(self._start), -1)
            return none, none
        some = self.counts > 0
        first = self._order[np.where(some, self._start, 0)]
        latest = self._order[np.where(some, self._stop - 1, 0)]
        return np.where(some, first, -1), np.where(some, latest, -1)


def concatenated_ranges(
    starts: Int64[np.ndarray, " bags"], lengths: Int64[np.ndarray, " bags"]
) -> Int64[np.ndarray, " total"]:
    """Write `starts[i], …, starts[i] + lengths[i] - 1` for each i, one run after the other."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return np.asarray(np.arange(len(shift)) + shift)
