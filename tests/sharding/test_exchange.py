"""The exchange equals the plain lookup: what must agree to the bit, and what nearly."""

import pytest

from tests.sharding.plain import (
    MEAN,
    NONE,
    SUM,
    Case,
    by_columns,
    by_rows,
    differences,
    everywhere,
    whole,
)

WORLD_SIZES = (1, 2, 4)


def mixed(world_size: int, **options) -> tuple:
    """A table of each kind."""
    return (
        whole("whole", world_size - 1, **options),
        by_rows("rows", world_size, **options),
        by_columns("columns", world_size, **options) if world_size > 1 else whole("c", 0),
        everywhere("everywhere", world_size),
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whole_tables_and_column_slices_equal_the_plain_lookup_to_the_bit(ranks, world_size):
    tables = (whole("a", world_size - 1), mixed(world_size)[2])
    found = differences(ranks, world_size, Case(tables, ((0, 0, SUM), (1, 1, SUM), (0, 1, MEAN))))
    assert (found.outputs, found.rows) == (0, 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_element_wise_rules_on_partials_update_rows_to_the_bit(ranks, world_size, rule):
    tables = (whole("a", world_size - 1), by_rows("b", world_size), mixed(world_size)[2])
    case = Case(tables, ((0, 0, SUM), (1, 1, SUM), (0, 1, SUM), (1, 2, SUM)), rule=rule)
    found = differences(ranks, world_size, case)
    assert found.outputs < 1e-6
    assert (found.rows, found.states) == (0, 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_vectors_of_ids_equal_the_plain_lookup_to_the_bit(ranks, world_size):
    tables = mixed(world_size)
    case = Case(tables, ((0, 0, NONE), (1, 1, NONE), (0, 2, NONE)), steps=1)
    found = differences(ranks, world_size, case)
    assert found.outputs == 0
    assert found.rows < 1e-6


@pytest.mark.parametrize("answer", ["partials", "rows"])
@pytest.mark.parametrize("is_variable", [False, True])
@pytest.mark.parametrize("when", ["backward", "step", "dense", "sparse"])
def test_weighted_and_plain_pooling_of_mixed_tables(ranks, answer, is_variable, when):
    features = ((0, 0, SUM), (1, 1, MEAN), (0, 2, SUM), (1, 3, SUM), (0, 1, SUM))
    case = Case(mixed(2, answer=answer), features, when=when, is_variable=is_variable)
    for is_weighted in (False, True):
        case = Case(**{**vars(case), "is_weighted": is_weighted})
        found = differences(ranks, 2, case)
        assert max(found.outputs, found.rows, found.weights) < 1e-6


def test_rank_without_a_slice_takes_part(ranks):
    found = differences(ranks, 4, Case((whole("a", 2),), ((0, 0, SUM),), is_weighted=True))
    assert (found.outputs, found.rows) == (0, 0)
    assert found.weights < 1e-6
