"""Rules with row sums are one algorithm whether a row lies on one rank or on several."""

import pytest

from tests.sharding.plain import NONE, SUM, Case, differences, grid, whole

CUT = grid("cut", (0, 13), (0, 3, 8), [[1, 0]])
TWICE_HERE = grid("twice", (0, 13), (0, 2, 5, 8), [[1, 0, 1]])
GRID = grid("grid", (0, 5, 13), (0, 3, 8), [[0, 2], [1, 3]])
REPLICA = grid("replica", (0, 5, 13), (0, 3, 8), [[(0, 1), 2], [(1, 3), 3]])
WITH_SUMS = (
    "row_wise_adagrad",
    "partial_row_wise_adam",
    "lamb",
    "partial_row_wise_lamb",
    "lars_sgd",
)


@pytest.mark.parametrize("rule", WITH_SUMS)
@pytest.mark.parametrize("when", ["backward", "step"])
def test_rules_see_whole_rows_of_column_slices(ranks, rule, when):
    tables = (CUT, TWICE_HERE, whole("whole", 1))
    case = Case(tables, ((0, 0, SUM), (1, 1, NONE), (0, 2, SUM)), rule=rule, when=when)
    found = differences(ranks, 2, case)
    assert max(found.outputs, found.rows, found.states) < 2e-6


@pytest.mark.parametrize("rule", ["row_wise_adagrad", "lamb"])
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_rules_see_whole_rows_of_grids_and_replicas(ranks, rule, num_hosts):
    case = Case((GRID, REPLICA), ((0, 0, SUM), (1, 1, SUM)), rule=rule, num_hosts=num_hosts)
    found = differences(ranks, 4, case)
    assert max(found.outputs, found.rows, found.states) < 2e-6
