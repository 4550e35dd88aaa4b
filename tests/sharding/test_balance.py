"""The plan for those who give none: by bytes, the same on every rank."""

from torch import nn

from shardwise.sharding import ShardingEnv
from shardwise.sharding.balance import balanced_plan
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig


class Model(nn.Module):
    def __init__(self, *rows: int) -> None:
        super().__init__()
        tables = [EmbeddingBagConfig(count, 4, f"t{i}") for i, count in enumerate(rows)]
        self.bags = EmbeddingBagCollection(tables[:2], device="meta")
        self.more = EmbeddingBagCollection(tables[2:], device="meta")


def plan(world_size: int, *rows: int):
    env = ShardingEnv.from_local(world_size, 0)
    return balanced_plan(Model(*rows), env, {EmbeddingBagCollection}, "cpu")


def ranks_of(made) -> dict[str, list[int]]:
    return {table: one.ranks for own in made.plan.values() for table, one in own.items()}


def test_large_tables_are_cut_and_the_others_go_where_there_is_room():
    made = plan(2, 100, 30, 20, 12)
    assert made.plan["bags"]["t0"].sharding_type == "row_wise"
    assert ranks_of(made) == {"t0": [0, 1], "t1": [0], "t2": [1], "t3": [1]}


def test_one_rank_holds_everything():
    assert ranks_of(plan(1, 100, 30, 20)) == {"t0": [0], "t1": [0], "t2": [0]}


def test_only_collections_of_the_types_are_placed():
    env = ShardingEnv.from_local(2, 0)
    assert balanced_plan(Model(5, 5, 5), env, {nn.Linear}, "cpu").plan == {}
