"""Ids for several ranks of one host go there once, and the result is the same."""

import pytest

from tests.sharding.plain import (
    MEAN,
    SUM,
    Case,
    by_rows,
    differences,
    grid,
    whole,
)

ON_ONE_HOST = grid("host", (0, 5, 13), (0, 8), [[2], [3]])
GRID = grid("grid", (0, 5, 13), (0, 3, 8), [[0, 2], [1, 3]])
REPLICAS = grid("replicas", (0, 2, 5, 13), (0, 8), [[(0, 3)], [1], [(0, 2)]])
TANGLED = grid("tangled", (0, 2, 5, 9, 13), (0, 8), [[1], [3], [0], [2]])


@pytest.mark.parametrize("table", [by_rows("rows", 4), ON_ONE_HOST, GRID, REPLICAS, TANGLED])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_relay_trains_as_the_plain_lookup(ranks, table, is_weighted):
    features = ((0, 0, SUM), (1, 0, MEAN), (1, 1, SUM))
    rule = "row_wise_adagrad" if is_weighted else "adam"
    case = Case((table, whole("direct", 1)), features, rule, is_weighted=is_weighted, num_hosts=2)
    found = differences(ranks, 4, case)
    assert max(found.outputs, found.rows, found.states, found.weights) < 2e-6


def test_relay_of_a_variable_batch(ranks):
    case = Case((by_rows("a", 4), GRID), ((0, 0, SUM), (1, 1, MEAN)), is_variable=True, num_hosts=2)
    found = differences(ranks, 4, case)
    assert max(found.outputs, found.rows) < 1e-6
