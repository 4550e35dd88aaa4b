"""The usual ways to cut a table, and the sizes of their blocks."""

import pytest
import torch

from shardwise import EmbeddingBagCollection, EmbeddingBagConfig, apply_optimizer_in_backward
from shardwise.sharding import (
    Slice,
    answered,
    apply_to_all,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    place_tables,
    row_wise,
    slices,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from shardwise.sharding.builders import column_block, split_rows


def collection(rows=10, columns=8, **options):
    tables = [EmbeddingBagConfig(rows, columns, "t", **options)]
    return EmbeddingBagCollection(tables, device="meta")


def build(builder, *, rows=10, columns=8, world_size=4, local_size=2, **options):
    module = collection(rows, columns, **options)
    plan = construct_module_sharding_plan(
        module, {"t": builder}, None, local_size, world_size, device_type="cpu"
    )
    placed = place_tables(
        module.embedding_bag_configs(), plan, world_size=world_size, is_pooled=True
    )
    return plan["t"], placed[0]


@pytest.mark.parametrize(
    ("rows", "blocks", "sizes"),
    [(10, 4, [3, 3, 3, 1]), (5, 4, [2, 2, 1, 0]), (3, 4, [1, 1, 1, 0]), (8, 1, [8])],
)
def test_rows_are_cut_equally_and_late_blocks_are_short(rows, blocks, sizes):
    assert [last - first for first, last in split_rows(rows, blocks)] == sizes


@pytest.mark.parametrize(
    ("buckets", "sizes"), [(6, [4, 4, 2, 2]), (4, [3, 3, 3, 3]), (3, [4, 4, 4, 0])]
)
def test_buckets_stay_whole_and_the_first_blocks_have_more(buckets, sizes):
    cuts = split_rows(12, 4, buckets)
    assert [last - first for first, last in cuts] == sizes


def test_rows_that_do_not_divide_into_buckets_are_refused():
    with pytest.raises(ValueError, match="10 rows do not divide into 4 equal buckets"):
        build(row_wise(), total_num_buckets=4)


@pytest.mark.parametrize(
    ("columns", "least", "block"),
    [(256, 128, 128), (300, 128, 300), (128, 128, 128), (512, 64, 64), (24, 6, 8), (6, 1, 6)],
)
def test_columns_are_cut_to_the_smallest_equal_block_allowed(columns, least, block):
    assert column_block(columns, least) == block


# `cells` of 10 x 8 on 4 ranks, 2 per host
CELLS = {
    "data_parallel": (data_parallel(), (((0, 1, 2, 3),),)),
    "table_wise": (table_wise(2), (((2,),),)),
    "row_wise": (row_wise(), (((0,),), ((1,),), ((2,),), ((3,),))),
    "column_wise": (column_wise([3, 1]), (((3,), (1,)),)),
    "table_row_wise": (table_row_wise(1), (((2,),), ((3,),))),
    "table_column_wise": (table_column_wise(1, [6, 2]), (((2,), (3,)),)),
    "grid_shard": (grid_shard([1, 0]), (((2,), (0,)), ((3,), (1,)))),
    "slices": (
        slices([Slice("t", (0, 9), (0, 8), (3,)), Slice("t", (9, 10), (0, 8), (0, 1))]),
        (((3,),), ((0, 1),)),
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_builder_puts_blocks_on_its_ranks(name):
    builder, cells = CELLS[name]
    sharding, placement = build(builder)
    assert sharding.sharding_type == name
    assert placement.cells == cells
    assert (placement.num_rows, placement.num_columns) == (10, 8)


def test_grid_lists_its_blocks_column_block_after_column_block():
    sharding, _ = build(grid_shard([1, 0]), local_size=2)
    offsets = [shard.shard_offsets for shard in sharding.sharding_spec.shards]
    assert offsets == [[0, 0], [5, 0], [0, 4], [5, 4]]
    assert sharding.ranks == [2, 3, 0, 1]


def test_row_wise_takes_sizes():
    sharding, placement = build(row_wise(([1, 0, 7, 2], "cpu")))
    assert placement.row_cuts == (0, 1, 8, 10)
    assert placement.cells == (((0,),), ((2,),), ((3,),))
    assert [shard.shard_sizes for shard in sharding.sharding_spec.shards][1] == [0, 8]


def test_column_wise_takes_ranks_in_turn():
    _, placement = build(column_wise(), columns=640, world_size=2)
    assert placement.column_cuts == (0, 128, 256, 384, 512, 640)
    assert placement.cells == (((0,), (1,), (0,), (1,), (0,)),)


def test_column_blocks_of_one_rank_lie_as_one():
    _, placement = build(column_wise([1, 1]))
    assert placement.cells == (((1,),),)


def test_shards_name_rank_and_device():
    plan = construct_module_sharding_plan(
        collection(), {"t": row_wise()}, local_size=2, world_size=4, device_type="cuda"
    )
    places = [str(shard.placement) for shard in plan["t"].sharding_spec.shards]
    assert places == ["rank:0/cuda:0", "rank:1/cuda:1", "rank:2/cuda:0", "rank:3/cuda:1"]


def test_table_is_answered_as_said():
    _, placement = build(answered(row_wise(), "rows", relay=False))
    assert (placement.answer, placement.relay) == ("rows", False)


def test_kernel_is_dense_unless_an_optimizer_runs_in_backward():
    module = EmbeddingBagCollection(
        [EmbeddingBagConfig(4, 4, "a"), EmbeddingBagConfig(4, 4, "b")], device="meta"
    )
    weight = module.embedding_bags["b"].weight
    apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})
    builders = apply_to_all(module, row_wise())
    plan = construct_module_sharding_plan(module, builders, local_size=2, world_size=2)
    assert {name: one.compute_kernel for name, one in plan.items()} == {"a": "dense", "b": "fused"}
    kernel = table_wise(0, compute_kernel="fused")
    assert build(kernel)[0].compute_kernel == "fused"


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (table_wise(4), r"'t': placed on ranks \[4\], but there are ranks 0 to 3"),
        (table_wise(0, device="cuda"), "'t': device 'cuda', but the plan is for 'cpu'"),
        (row_wise(([5, 5], "cpu")), "'t', row-wise over 4 ranks: got 2 sizes"),
        (
            row_wise(([5, 5, 1, 0], "cpu")),
            r"'t', row-wise over 4 ranks: sizes \[5, 5, 1, 0\] must .* add up to 10",
        ),
        (column_wise([0, 1, 2]), "'t': 8 columns do not divide into 3 equal blocks"),
        (column_wise([0, 1], [8]), "'t', column-wise: got 2 ranks and 1 sizes"),
        (column_wise([0, 1], [8, 1]), r"'t', column-wise: sizes \[8, 1\] .* add up to 8"),
        (table_row_wise(2), "'t': placed on host 2, but there are hosts 0 to 1"),
        (grid_shard([]), "'t': 8 columns do not divide into 0 equal blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_builder_says_what_it_cannot_do(builder, message):
    with pytest.raises(ValueError, match="table " + message):
        build(builder)


def test_plan_wants_a_builder_for_each_table():
    with pytest.raises(ValueError, match=r"\['t'\].*missing \['t'\], unknown \['u'\]"):
        construct_module_sharding_plan(collection(), {"u": row_wise()}, local_size=1, world_size=1)


def test_sharder_says_which_tables_there_are():
    class OnlyA:
        def shardable_parameters(self, module):
            return {"a": module.embedding_bags["a"].weight}

    module = EmbeddingBagCollection(
        [EmbeddingBagConfig(4, 4, "a"), EmbeddingBagConfig(4, 4, "b")], device="meta"
    )
    builders = apply_to_all(module, row_wise(), OnlyA())
    plan = construct_module_sharding_plan(module, builders, OnlyA(), 1, 2)
    assert list(plan) == ["a"]
