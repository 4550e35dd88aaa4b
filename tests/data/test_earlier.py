import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.earlier import EarlierEvents, concatenated_ranges

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=20)


def columns(events: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(events, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def seen(events: list[tuple[int, int]], query: tuple[int, int]) -> list[int]:
    """The definition: positions of the group's strictly earlier events, by time, then position."""
    group, time = query
    positions = [i for i, event in enumerate(events) if event[0] == group and event[1] < time]
    return sorted(positions, key=lambda i: events[i][1])


@given(events=pairs, queries=pairs, last=st.integers(0, 4))
def test_bags_hold_the_latest_strictly_earlier_events(events, queries, last):
    positions, lengths = EarlierEvents(*columns(events), *columns(queries)).bags(last)
    expected = [seen(events, query)[-last:] if last else [] for query in queries]
    assert positions.tolist() == [i for bag in expected for i in bag]
    assert lengths.tolist() == [len(bag) for bag in expected]


@given(events=pairs, queries=pairs, last=st.integers(1, 4) | st.none())
def test_sums_add_what_is_seen(events, queries, last):
    values = np.arange(len(events)) + 0.5
    sums = EarlierEvents(*columns(events), *columns(queries)).sums(values, last)
    assert sums.tolist() == [
        sum(i + 0.5 for i in seen(events, query)[-(last or len(events)) :]) for query in queries
    ]


@given(events=pairs, queries=pairs)
def test_edges_are_the_first_and_the_latest(events, queries):
    first, latest = EarlierEvents(*columns(events), *columns(queries)).edges()
    expected = [seen(events, query) or [-1] for query in queries]
    assert first.tolist() == [bag[0] for bag in expected]
    assert latest.tolist() == [bag[-1] for bag in expected]


@given(events=pairs)
def test_without_queries_each_event_looks_back_from_itself(events):
    counts = EarlierEvents(*columns(events)).counts
    assert counts.tolist() == [len(seen(events, event)) for event in events]


def test_sums_are_exact_whatever_other_groups_hold():
    groups, times = np.array([0, 1, 1]), np.array([0, 0, 1])
    for other in (0.1, 1e9 / 3):
        sums = EarlierEvents(groups, times).sums(np.array([other, 0.1, 0.0]))
        assert sums[2] == round(0.1 * 2**20) / 2**20


def test_concatenated_ranges_skip_empty_ones():
    ranges = concatenated_ranges(np.array([5, 9, 2]), np.array([2, 0, 3]))
    assert ranges.tolist() == [5, 6, 2, 3, 4]
