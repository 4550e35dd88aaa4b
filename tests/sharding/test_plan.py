"""Plans as values: placed, printed, saved, hashed and compared over ranks."""

import pytest
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec as TorchSpec

from shardwise import EmbeddingBagCollection, EmbeddingBagConfig
from shardwise.sharding import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    Slice,
    answered,
    check_equal_plans,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    get_local_rank,
    get_local_size,
    grid_shard,
    place_tables,
    plan_hash,
    row_wise,
    table_wise,
)

CONFIGS = [EmbeddingBagConfig(10, 8, "a"), EmbeddingBagConfig(6, 4, "b")]


def module_plan(world_size=4, device_type="cpu", **builders):
    module = EmbeddingBagCollection(CONFIGS, device="meta")
    builders = {"a": row_wise(), "b": table_wise(0), **builders}
    return construct_module_sharding_plan(module, builders, None, 2, world_size, device_type)


def placements(plan, *, is_pooled=True):
    return place_tables(CONFIGS, plan, world_size=4, is_pooled=is_pooled)


# ---- placed


@pytest.mark.parametrize("builder", [row_wise(), data_parallel(), grid_shard([0, 1])])
def test_list_of_slices_is_a_plan(builder):
    plan = module_plan(a=builder)
    parts = [s for config in CONFIGS for s in plan[config.name].to_slices(config, 4)]
    assert placements(parts) == placements(plan)


def test_tables_of_sequences_are_answered_by_rows():
    assert [p.answer for p in placements(module_plan(), is_pooled=False)] == ["rows", "rows"]


def test_replicas_are_one_slice():
    assert module_plan(b=data_parallel())["b"].to_slices(CONFIGS[1], 4) == [
        Slice("b", (0, 6), (0, 4), (0, 1, 2, 3))
    ]


def test_data_parallel_without_ranks_is_on_all():
    plan = {**module_plan(), "a": ParameterSharding("data_parallel", "dense")}
    assert placements(plan)[0].cells == (((0, 1, 2, 3),),)


def test_blocks_in_pytorchs_own_form_are_taken():
    shards = [
        ShardMetadata([0, 0], [4, 8], "rank:1/cpu"),
        ShardMetadata([4, 0], [6, 8], "rank:0/cpu"),
    ]
    given = ParameterSharding("row_wise", "dense", [1, 0], TorchSpec(shards))
    assert placements({**module_plan(), "a": given})[0].row_cuts == (0, 4, 10)
    assert given.sharding_spec.shards == shards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharding_type": "diagonal"}, "'a': sharding_type 'diagonal'; wants one of"),
        ({"compute_kernel": "fused_uvm"}, "'a': compute_kernel 'fused_uvm'; wants one of"),
        ({"answer": "sums"}, "'a': answer 'sums'; wants one of"),
        ({"cache_params": object()}, "'a': cache_params=.* leave it at None"),
        ({"stochastic_rounding": True}, "'a': stochastic_rounding=True .* update rule"),
        ({"sharding_spec": None}, "'a': row_wise needs a sharding_spec"),
    ],
    ids=["type", "kernel", "answer", "cache", "rounding", "no blocks"],
)
def test_option_that_does_nothing_is_refused(fields, message):
    plan = module_plan()
    vars(plan["a"]).update(fields)
    with pytest.raises(ValueError, match="table " + message):
        placements(plan)


def test_missing_and_unknown_tables_are_named():
    plan = module_plan()
    plan["c"] = plan.pop("b")
    with pytest.raises(ValueError, match=r"\['a', 'b'\]: missing \['b'\], unknown \['c'\]"):
        placements(plan)


# ---- as text


def test_plan_prints_as_a_table():
    plan = ShardingPlan({"sparse.ebc": module_plan(b=answered(data_parallel(), "rows"))})
    assert str(plan).splitlines() == [
        "module      table  sharding       kernel  answer    ranks  blocks  largest block",
        "sparse.ebc  a      row_wise       dense   partials  0-3    4       3 x 8",
        "sparse.ebc  b      data_parallel  dense   rows      0-3    1       whole table",
    ]
    assert str(plan.plan["sparse.ebc"]).splitlines()[0].startswith("table  sharding")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "builder",
    [
        row_wise(),
        answered(row_wise(([4, 0, 4, 2], [])), "rows", relay=False),
        column_wise([1, 3]),
        data_parallel(),
        grid_shard([1, 0]),
    ],
    ids=["row_wise", "uneven", "column_wise", "data_parallel", "grid"],
)
def test_json_gives_the_plan_back(builder, device_type):
    own = module_plan(device_type=device_type, a=builder)
    plan = ShardingPlan({"": own, "m.x": own})
    assert ShardingPlan.from_json(plan.to_json()) == plan


def test_plan_is_saved_and_loaded(tmp_path):
    plan = ShardingPlan({"ebc": module_plan()})
    plan.save(tmp_path / "plan.json")
    loaded = ShardingPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert isinstance(loaded.get_plan_for_module("ebc"), EmbeddingModuleShardingPlan)
    assert loaded.get_plan_for_module("other") is None


@pytest.mark.parametrize("text", ["[]", '{"plan": {}}'])
def test_other_json_is_no_plan(text):
    with pytest.raises(ValueError, match="not a plan"):
        ShardingPlan.from_json(text)


# ---- the same on all ranks


def test_hash_asks_where_tables_lie_and_not_how_that_was_said():
    grid = placements(module_plan(a=grid_shard([0])))
    rows = placements(module_plan(a=row_wise(([5, 5, 0, 0], "cpu"))))
    assert plan_hash({"m": grid}) == plan_hash({"m": rows})
    assert plan_hash({"m": grid}) != plan_hash({"n": grid})
    assert plan_hash({"m": grid}) != plan_hash({"m": grid[::-1]})
    assert plan_hash({"m": grid}) != plan_hash({"m": placements(module_plan())})


class Gloo:
    def gather_texts(self, text):
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        return texts


def compare(rank, world_size, cases):
    """The error on this rank for each case: a plan and notes per rank."""
    errors = []
    for case in cases:
        plan, notes = case[rank]
        try:
            check_equal_plans(plan, Gloo(), notes)
            errors.append(None)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_difference_between_plans_names_rank_and_table(ranks):
    one, other = placements(module_plan()), placements(module_plan(b=column_wise([1, 0])))
    same = [({"m": one}, {})] * 3
    cases = [
        same,
        [*same[:2], ({"m": other}, {})],
        [*same[:1], ({"m": one[:1]}, {}), *same[:1]],
        [*same[:1], ({"m": one}, {"m": "int8"}), *same[:1]],
        [*same[:2], ({"m": one, "n": one}, {})],
    ]
    found = ranks(3, compare, cases)
    assert found[0] == found[1] == found[2]
    equal, table, missing, noted, module = found[0]
    assert equal is None
    assert "rank 2 has table 'b' of module 'm': 6 x 4, cut at rows [] and columns [2]" in table
    assert "rank 0 has table 'b' of module 'm': 6 x 4, cut at rows [] and columns []" in table
    assert "rank 1 has module 'm': no more tables, rank 0 has table 'b'" in missing
    assert "rank 1 has module 'm': int8, rank 0 has module 'm': no more tables" in noted
    assert "rank 2 has table 'a' of module 'n'" in module
    assert "rank 0 has no more modules" in module


# ---- the ranks there are


@pytest.fixture
def no_launcher(monkeypatch):
    for launcher in ("", "OMPI_COMM_", "MV2_COMM_"):
        for name in ("LOCAL_WORLD_SIZE", "WORLD_LOCAL_SIZE", "LOCAL_RANK", "WORLD_LOCAL_RANK"):
            monkeypatch.delenv(launcher + name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    ("name", "value", "world_size", "size"),
    [
        ("LOCAL_WORLD_SIZE", "2", 6, 2),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "3", 6, 3),
        ("LOCAL_WORLD_SIZE", "4", 6, 6),
        ("UNRELATED", "", 16, 8),
        ("UNRELATED", "", 12, 12),
    ],
)
def test_ranks_per_host_come_from_the_launcher(monkeypatch, name, value, world_size, size):
    monkeypatch.setenv(name, value)
    assert get_local_size(world_size) == size
    assert get_local_rank(world_size, world_size - 1) == size - 1
    assert len(ShardingEnv(world_size, 0).hosts) == world_size // size


@pytest.mark.usefixtures("no_launcher")
def test_local_rank_is_the_launchers(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert get_local_rank(8, 0) == 5


def test_hosts_are_taken_as_given():
    assert ShardingEnv(3, 1, hosts=((2, 0), (1,))).hosts == ((2, 0), (1,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, "rank 3 is not one of 3"),
        ({"hosts": ((0, 1), (1, 2))}, "each of ranks 0 to 2 once"),
        ({"hosts": ((0, 1, 2), ())}, "no host without ranks"),
        ({"output_dtensor": True}, "output_dtensor"),
    ],
    ids=["rank", "twice", "empty", "dtensor"],
)
def test_environment_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ShardingEnv(**{"world_size": 3, "rank": 0, **fields})


def environment(rank, world_size):
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return env.world_size, env.rank, env.process_group is dist.group.WORLD


def test_environment_of_a_process_group(ranks):
    assert ranks(2, environment) == [(2, 0, True), (2, 1, True)]
