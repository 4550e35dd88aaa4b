"""Slices, and the one grid that any tiling comes to."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise import EmbeddingBagConfig
from shardwise.sharding import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    Slice,
)
from shardwise.sharding.placement import lines_of, place

WORLD_SIZE = 5


def cut(shape, slices):
    return place("t", shape, lines_of(slices), world_size=WORLD_SIZE)


def painted(shape, slices):
    """The ranks of each element, as bits; fails where two slices meet."""
    elements = np.zeros(shape, dtype=np.int64)
    for one in slices:
        block = elements[slice(*one.rows), slice(*one.columns)]
        assert not block.any()
        block += sum(1 << rank for rank in one.ranks)
    return elements


@st.composite
def tilings(draw):
    """A table cut again and again, along rows or columns, into a brick wall: blocks, and ranks."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    blocks = [((0, shape[0]), (0, shape[1]))]
    for _ in range(draw(st.integers(0, 8))):
        rows, columns = blocks.pop(draw(st.integers(0, len(blocks) - 1)))
        if draw(st.booleans()):
            at = draw(st.integers(*rows))  # at an end: an empty block
            blocks += [((rows[0], at), columns), ((at, rows[1]), columns)]
        else:
            at = draw(st.integers(*columns))
            blocks += [(rows, (columns[0], at)), (rows, (at, columns[1]))]
    ranks = st.sets(st.integers(0, WORLD_SIZE - 1), min_size=1).map(tuple)
    return shape, [(*block, draw(ranks)) for block in draw(st.permutations(blocks))]


@given(tilings())
def test_grid_holds_each_element_where_its_slice_was(tiling):
    shape, slices = tiling[0], [Slice("t", *block) for block in tiling[1]]
    cells = list(cut(shape, slices).slices())
    assert np.array_equal(painted(shape, cells), painted(shape, slices))
    assert painted(shape, cells).all()


@given(tilings())
def test_every_cut_of_the_grid_separates_something(tiling):
    placement = cut(tiling[0], [Slice("t", *block) for block in tiling[1]])
    columns = list(zip(*placement.cells, strict=True))
    for blocks in (placement.cells, columns):
        assert all(a != b for a, b in pairwise(blocks))


@given(tilings())
def test_normal_form_is_its_own_normal_form(tiling):
    shape, slices = tiling[0], [Slice("t", *block) for block in tiling[1]]
    placement = cut(shape, slices)
    assert cut(shape, list(placement.slices())) == placement


@given(tilings(), st.data())
def test_order_of_slices_and_further_cuts_do_not_matter(tiling, data):
    shape, slices = tiling[0], [Slice("t", *block) for block in tiling[1]]
    one = data.draw(st.sampled_from(slices))
    at = data.draw(st.integers(*one.rows))
    halves = [
        Slice("t", (one.rows[0], at), one.columns, one.ranks[::-1]),
        Slice("t", (at, one.rows[1]), one.columns, one.ranks),
    ]
    others = [other for other in slices if other is not one]
    assert cut(shape, halves + others) == cut(shape, slices)


@given(tilings())
def test_any_tiling_goes_through_json(tiling):
    slices = [Slice("t", *block) for block in tiling[1]]
    module = EmbeddingModuleShardingPlan(t=ParameterSharding.from_slices(slices))
    plan = ShardingPlan.from_json(ShardingPlan({"m": module}).to_json())
    assert plan == ShardingPlan({"m": module})
    full = [s for s in slices if s.rows[0] < s.rows[1] and s.columns[0] < s.columns[1]]
    config = EmbeddingBagConfig(*tiling[0], "t")
    assert plan.plan["m"]["t"].to_slices(config, WORLD_SIZE) == full


def test_brick_wall_is_cut_to_a_grid():
    wall = [
        Slice("t", (0, 4), (0, 8), (0,)),
        Slice("t", (4, 10), (0, 2), (1,)),
        Slice("t", (4, 10), (2, 8), (2,)),
    ]
    placement = cut((10, 8), wall)
    assert placement.row_cuts == (0, 4, 10)
    assert placement.column_cuts == (0, 2, 8)
    assert placement.cells == (((0,), (0,)), ((1,), (2,)))
    assert placement.ranks == (0, 1, 2)


def test_hot_rows_may_lie_on_all_ranks():
    hot = [Slice("t", (0, 3), (0, 4), (4, 1, 0)), Slice("t", (3, 10), (0, 4), (2,))]
    assert cut((10, 4), hot).cells == (((0, 1, 4),), ((2,),))


def test_equal_blocks_on_several_ranks_are_replicas():
    copies = [Slice("t", (0, 10), (0, 4), (rank,)) for rank in (3, 1)]
    assert cut((10, 4), copies).cells == (((1, 3),),)


def test_empty_slices_are_dropped():
    slices = [Slice("t", (0, 3), (0, 4), (0,)), Slice("t", (3, 3), (0, 4), (1,))]
    assert cut((3, 4), slices).cells == (((0,),),)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([Slice("t", (0, 6), (0, 4), (0,))], r"rows \[6, 10\), columns \[0, 4\) lie in no slice"),
        (
            [Slice("t", (0, 10), (0, 4), (0,)), Slice("t", (7, 9), (1, 3), (1,))],
            r"rows \[7, 9\), columns \[1, 3\) lie in 2 slices: rows \[0, 10\).* on ranks \(1,\)",
        ),
        (
            [Slice("t", (0, 11), (0, 4), (0,))],
            r"rows \[0, 11\).* outside the table of 10 rows and 4 columns",
        ),
        ([Slice("t", (0, 10), (0, 4), (0, 5))], r"on rank 5, but there are ranks 0 to 4"),
        ([Slice("t", (0, 10), (0, 4), (2,))] * 2, r"rows \[0, 10\).* on rank 2 twice"),
        ([], r"rows \[0, 10\), columns \[0, 4\) lie in no slice"),
    ],
    ids=["uncovered", "twice", "outside", "rank", "rank twice", "none"],
)
def test_fault_in_a_tiling_is_named(slices, message):
    with pytest.raises(ValueError, match="table 't': .*" + message):
        cut((10, 4), slices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": (3, 2)}, r"rows \[3, 2\).*end before"),
        ({"columns": (3, 2)}, r"columns \[3, 2\).*end before"),
        ({"ranks": ()}, "one or more ranks"),
        ({"ranks": (1, 1)}, "all different"),
        ({"tier": "ssd"}, "'ssd' is not available"),
    ],
    ids=["rows", "columns", "no rank", "rank twice", "tier"],
)
def test_slice_that_cannot_be_is_refused(fields, message):
    given = {"table": "t", "rows": (0, 1), "columns": (0, 1), "ranks": (0,), **fields}
    with pytest.raises(ValueError, match="table 't'.*" + message):
        Slice(**given)
