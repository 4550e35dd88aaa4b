"""Sharding in place: weights, names, rules, meta tables, forms of plans, bad plans."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.sharding import (
    ShardingEnv,
    ShardingPlan,
    Slice,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    replicas,
    row_wise,
    shard,
    sharded_parameters,
    table_wise,
)
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    FeatureProcessedEmbeddingBagCollection,
    PositionWeightedModule,
)

CONFIGS = [EmbeddingBagConfig(10, 8, "a"), EmbeddingBagConfig(6, 4, "b")]
BUILDERS = {"a": row_wise, "b": lambda: table_wise(0)}


def make(seed=0, **options) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    return EmbeddingBagCollection(CONFIGS, **options)


def plan(module, ranks, **builders):
    builders = {name: make() for name, make in (BUILDERS | builders).items()}
    return construct_module_sharding_plan(module, builders, world_size=ranks, device_type="cpu")


def batch(ids=(3, 1, 2, 5)) -> KeyedJaggedTensor:
    lengths = torch.tensor([2, 0, 1, 1])
    return KeyedJaggedTensor(["a", "b"], torch.tensor(ids), lengths=lengths)


def cuts(collection) -> dict[str, tuple]:
    return {name: tuple(p.shape) for name, p in collection.named_parameters()}


def shard_initialised(rank, world_size):
    plain, sharded = make(seed=rank), make(seed=rank)
    assert shard(sharded, plan(sharded, world_size, b=data_parallel)) is sharded
    a = sharded.embedding_bags["a"]
    is_own = torch.equal(a.weight, a.cut(plain.stores[0].weight))
    return is_own, sharded.embedding_bags["b"].weight.detach()


def test_slices_are_of_the_ranks_own_copy_and_replicas_of_the_first(ranks):
    (first, b), (second, copy) = ranks(2, shard_initialised)
    assert first
    assert second
    assert torch.equal(b, copy)
    assert torch.equal(b, make(seed=0).embedding_bags["b"].weight)


def replicate_on_some(rank, world_size):
    sharded = make(seed=rank)
    in_backward(sharded, RowWiseAdagrad, initial_accumulator_value=rank)
    parts = [
        Slice("a", (0, 10), (0, 8), (1, 3)),
        Slice("b", (0, 6), (0, 4), (0, 2, 3)),
    ]
    with patch.object(replicas, "_ELEMENTS_AT_ONCE", 7):  # in many pieces
        shard(sharded, parts)
    wanted = {0: (make(seed=1), 1.0), 1: (make(seed=0), 0.0)}
    for store in sharded.stores:
        plain, state = wanted[store.key]
        assert torch.equal(store.weight, store.cut(plain.stores[store.key].weight))
        assert torch.equal(store.states["sum"], torch.full((store.weight.shape[0],), state))


def test_replicas_on_some_ranks_are_those_of_their_first(ranks):
    ranks(4, replicate_on_some)


def name_slices(rank, world_size):
    sharded = make()
    shard(sharded, plan(sharded, world_size, a=lambda: column_wise([0, 1, 0, 1], [2, 1, 3, 2])))
    return cuts(sharded)


def test_parameters_are_the_slices_and_every_rank_names_every_table(ranks):
    first, second = ranks(2, name_slices)
    assert first == {
        "embedding_bags.a.weight": (10, 2),
        "embedding_bags.a.1.weight": (10, 3),
        "embedding_bags.b.weight": (6, 4),
    }
    assert second == {
        "embedding_bags.a.weight": (10, 1),
        "embedding_bags.a.1.weight": (10, 2),
        "embedding_bags.b.weight": (0, 4),
    }


def draw_from_meta(rank, world_size):
    torch.manual_seed(rank)  # the seed of rank 0 counts
    sharded = EmbeddingBagCollection(CONFIGS, device="meta")
    shard(sharded, plan(sharded, world_size))
    plain = make(seed=0)
    return [torch.equal(s.weight, s.cut(plain.stores[s.key].weight)) for s in sharded.stores]


def test_meta_tables_start_as_plain_ones_of_the_same_seed(ranks):
    assert ranks(2, draw_from_meta) == [[True, True]] * 2


def carry_rule(rank, world_size):
    plain, sharded = make(), make()
    plain_optimizer, optimizer = (in_backward(m, RowWiseAdagrad, lr=0.1) for m in (plain, sharded))
    for module in (plain, sharded):
        module(batch()).values().sum().backward()
    shard(sharded, plan(sharded, world_size))
    state = optimizer.state_dict()["state"]
    wanted = plain_optimizer.state_dict()["state"]
    assert [*state] == [*wanted]
    assert state["embedding_bags.a.weight"]["step"] == 1
    kept = [
        torch.equal(s.states["sum"], s.cut(plain.stores[s.key].states["sum"]))
        for s in sharded.stores
    ]
    optimizer.param_groups[0]["lr"] = 0.5
    for module, one in ((plain, plain_optimizer), (sharded, optimizer)):
        one.param_groups[0]["lr"] = 0.5
        one.zero_grad()
        module(batch()).values().sum().backward()
    pairs = [(s.weight, s.cut(plain.stores[s.key].weight)) for s in sharded.stores]
    return kept + [torch.allclose(got, wanted) for got, wanted in pairs]


@pytest.mark.parametrize("world_size", [1, 2])
def test_rules_bound_before_go_along_with_their_state(ranks, world_size):
    assert ranks(world_size, carry_rule) == [[True] * 4] * world_size


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.tables = make(**options)
        self.dense = nn.Linear(12, 1)

    def forward(self, features) -> torch.Tensor:
        return self.dense(self.tables(features).values())


def take_each_form(rank, world_size):
    parts = [Slice("a", (0, 10), (0, 8), (0,)), Slice("b", (0, 6), (0, 4), (world_size - 1,))]
    builders = {"a": lambda: table_wise(0), "b": lambda: table_wise(world_size - 1)}
    whole_model, module_plan, by_slices = Net(), make(), make()
    own = plan(whole_model.tables, world_size, **builders)
    shard(whole_model, ShardingPlan({"tables": own}))
    shard(module_plan, own)
    shard(by_slices, parts)
    assert {*sharded_parameters(whole_model)} == {*whole_model.tables.parameters()}
    return [cuts(m) for m in (whole_model.tables, module_plan, by_slices)]


def test_plans_of_a_model_a_collection_and_slices_are_the_same(ranks):
    for shapes in ranks(2, take_each_form):
        assert shapes[0] == shapes[1] == shapes[2]


def test_one_process_needs_no_process_group():
    plain, sharded = make(), make()
    shard(sharded, plan(sharded, 1), ShardingEnv.from_local(1, 0))
    assert torch.equal(sharded(batch()).values(), plain(batch()).values())


def test_collection_behind_feature_processors_is_found_by_either_path():
    for path in ("", "_embedding_bag_collection"):
        bags = make(is_weighted=True)
        module = FeatureProcessedEmbeddingBagCollection(bags, {"a": PositionWeightedModule(3)})
        shard(module, ShardingPlan({path: plan(bags, 1)}), ShardingEnv.from_local(1, 0))
        assert sharded_parameters(module) == {*bags.parameters()}


# ---- bad plans


def test_path_without_a_collection_is_refused():
    with pytest.raises(ValueError, match=r"names module 'dense', in which there are 0 .*'tables'"):
        shard(Net(), ShardingPlan({"dense": plan(make(), 1)}))


def test_collection_is_sharded_once():
    sharded = make()
    shard(sharded, plan(sharded, 1))
    with pytest.raises(ValueError, match="is sharded already"):
        shard(sharded, plan(sharded, 1))


def test_optimizer_that_holds_tables_from_before_is_refused():
    collection = make()
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    shard(collection, plan(collection, 1))
    with pytest.raises(RuntimeError, match=r"SGD holds table 'a' as it was before `shard` cut it"):
        optimizer.step()
    torch.optim.SGD(collection.parameters(), lr=0.1).step()


def test_collection_with_a_rule_must_be_planned():
    model = Net()
    in_backward(model, RowWiseAdagrad)
    with pytest.raises(ValueError, match="'tables' has an update rule and no plan"):
        shard(model, ShardingPlan({}))


def shard_by_plans_that_differ(rank, world_size):
    sharded = make()
    builders = {"b": lambda: table_wise(rank)}
    before = cuts(sharded)
    with pytest.raises(ValueError, match=r"rank 1 has .*table 'b'"):
        shard(sharded, plan(sharded, world_size, **builders))
    return cuts(sharded) == before


def test_plans_that_differ_are_named_and_nothing_moves(ranks):
    assert ranks(2, shard_by_plans_that_differ) == [True, True]


def shard_by_a_bad_plan(rank, world_size):
    sharded = make()
    own = plan(sharded, world_size)
    if rank == 1:
        del own["b"]
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        shard(sharded, own)


def test_bad_plan_of_one_rank_is_an_error_on_all(ranks):
    ranks(2, shard_by_a_bad_plan)


def look_up_with_a_fault(rank, world_size, ids, keys, error, text):
    sharded = make()
    shard(sharded, plan(sharded, world_size))
    good = batch()
    faulty = KeyedJaggedTensor(keys, torch.tensor(ids), lengths=good.lengths())
    before = [parameter.detach().clone() for parameter in sharded.parameters()]
    with pytest.raises(error, match=text):
        sharded(faulty if rank == 1 else good)
    assert all(torch.equal(a, b) for a, b in zip(before, sharded.parameters(), strict=True))
    return sharded(good).values().shape  # all ranks are in step again


@pytest.mark.parametrize(
    ("ids", "keys", "error", "text"),
    [
        ([3, 1, 2, 5], ["a", "x"], KeyError, r"rank 1: .*unknown \['x'\]"),
        ([3, 1, 2, 6], ["a", "b"], IndexError, "rank 1: feature 'b', sample 1: id 6 is outside"),
        ([3, 1, 2], ["a", "b"], ValueError, "rank 1: .*3 values"),
    ],
)
def test_bad_input_of_one_rank_is_an_error_on_all(ranks, ids, keys, error, text):
    assert ranks(2, look_up_with_a_fault, ids, keys, error, text) == [(2, 12)] * 2
