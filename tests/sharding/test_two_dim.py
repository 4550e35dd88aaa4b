"""Tables on several groups of ranks: exact with gradients of all, averaged by `sync` otherwise."""

import pytest
import torch
import torch.distributed as dist

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRM
from shardwise.optim import SGD, RowWiseAdagrad, apply_optimizer_in_backward
from shardwise.sharding import (
    DMPCollection,
    EmbeddingModuleShardingPlan,
    ShardingPlan,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    group_ranks,
    row_wise,
    table_wise,
)
from shardwise.sharding.environment import equal_hosts
from shardwise.sharding.routes import Ranks
from shardwise.sharding.shard import sharded_collections
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

PATH = "sparse_arch.embedding_bag_collection"
ROWS = {"a": 40, "b": 6, "c": 9}


def make(rule, seed=0) -> DLRM:
    torch.manual_seed(seed)
    tables = [EmbeddingBagConfig(rows, 8, name) for name, rows in ROWS.items()]
    model = DLRM(EmbeddingBagCollection(tables), 3, [4, 8], [4, 1])
    apply_optimizer_in_backward(rule, model.sparse_arch.parameters(), {"lr": 0.1})
    return model


def plan_for_a_group(model, size, which=0) -> ShardingPlan:
    builders = [
        {"a": row_wise(), "b": table_wise(size - 1), "c": data_parallel()},
        {"a": table_wise(0), "b": column_wise([0, size - 1]), "c": row_wise()},
    ]
    plan = construct_module_sharding_plan(
        model.get_submodule(PATH), builders[which], world_size=size, device_type="cpu"
    )
    return ShardingPlan({PATH: plan})


def in_groups(model, size, **options) -> DMPCollection:
    world = dist.group.WORLD
    plan = plan_for_a_group(model, size)
    device = torch.device("cpu")
    return DMPCollection(model, device, plan, world.size(), size, world, **options)


def batch(rank, step, ranks=1):
    """The samples of some ranks from one on."""
    own = [torch.Generator().manual_seed(10 * step + r) for r in range(rank, rank + ranks)]
    ids = torch.cat([torch.randint(0, 6, (3, 4), generator=generator) for generator in own], 1)
    dense = torch.cat([torch.rand(4, 3, generator=generator) for generator in own])
    return dense, KeyedJaggedTensor([*ROWS], ids.flatten(), lengths=torch.ones(ids.numel()).long())


def train(model, given) -> float:
    dense = [p for name, p in model.named_parameters() if not name.startswith("sparse_arch")]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    loss = model(*given).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_equals(model, plain, **tolerance) -> None:
    wanted = plain.state_dict()
    for name, value in model.state_dict().items():
        value = value.full() if hasattr(value, "full") else value
        torch.testing.assert_close(value, wanted[name], **tolerance)


def train_both(rank, world_size, rule, size, options, steps=4):
    plain, model = make(rule), in_groups(make(rule), size, **options)
    pairs = []
    for step in range(steps):
        ours = train(model, batch(rank, step))
        pairs.append((ours, train(plain, batch(0, step, world_size))))
        model.sync()
    assert_equals(model, plain, rtol=1e-5, atol=1e-6)
    return pairs


GROUPS = [(1, 1, False), (2, 1, False), (4, 2, False), (4, 2, True)]


@pytest.mark.parametrize(("world_size", "size", "runs"), GROUPS)
@pytest.mark.parametrize(("rule", "exact"), [(RowWiseAdagrad, True), (SGD, False)])
def test_groups_train_as_the_plain_model(ranks, world_size, size, runs, rule, exact):
    options = {"sync_gradients": exact, "use_inter_host_allreduce": runs}
    results = ranks(world_size, train_both, rule, size, options)
    for step in zip(*results, strict=True):
        mean = sum(ours for ours, _ in step) / world_size
        assert mean == pytest.approx(step[0][1], rel=1e-5)


def average(rank, world_size, with_state):
    model = in_groups(make(RowWiseAdagrad, seed=rank), 2)
    for step in range(2):
        train(model, batch(rank, step))
    stores = [s for _, c in sharded_collections(model.module) for s in c.stores]
    before = [(s.weight.detach().clone(), s.states["sum"].clone()) for s in stores]
    model.sync(include_optimizer_state=with_state)
    return before, [(s.weight.detach(), s.states["sum"]) for s in stores]


@pytest.mark.parametrize("with_state", [True, False])
def test_sync_gives_the_mean_of_the_groups(ranks, with_state):
    results = ranks(4, average, with_state)
    for first, second in ((0, 1), (2, 3)):  # ranks of the same place in their groups
        (before, after), (others, other_after) = results[first], results[second]
        for own, other, new, other_new in zip(before, others, after, other_after, strict=True):
            assert torch.equal(new[0], other_new[0])
            torch.testing.assert_close(new[0], (own[0] + other[0]) / 2)
            mean = (own[1] + other[1]) / 2
            torch.testing.assert_close(new[1], mean if with_state else own[1])
    moved = [a[0].ne(b[0]).any() for a, b in zip(results[0][0], results[1][0], strict=True)]
    assert any(moved)  # so that there was something to average


def start(rank, world_size, size):
    torch.manual_seed(rank)
    tables = [EmbeddingBagConfig(rows, 8, name) for name, rows in ROWS.items()]
    collection = EmbeddingBagCollection(tables, device="meta")
    model = in_groups(DLRM(collection, 3, [4, 8], [4, 1]), size)
    return [v.full() for n, v in model.state_dict().items() if n.startswith("sparse")]


def test_groups_start_equal(ranks):
    first, *others = ranks(4, start, 2)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def send(rank, world_size, runs):
    model = in_groups(make(SGD), 2, sync_gradients=True, use_inter_host_allreduce=runs)
    layout = dict(sharded_collections(model.module))[PATH].layout
    hop = layout.exchange._layout.hop.routes
    owner = torch.bucketize(hop.channels, hop.first_channel[1:], right=True)
    return sorted(set(owner.tolist()))


@pytest.mark.parametrize("runs", [False, True])
def test_ids_stay_within_the_group(ranks, runs):
    asked = ranks(4, send, runs)
    groups = group_ranks(4, 2, is_contiguous=runs)
    assert asked == [next(group for group in groups if rank in group) for rank in range(4)]


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_asks_its_own_group(hosts, size, runs):
    groups = group_ranks(16, size, is_contiguous=runs)
    for group in groups:
        for rank in group:
            ranks = Ranks(rank, equal_hosts(16, 16 // hosts))
            assert [ranks.choose(cell) for cell in zip(*groups, strict=True)] == group


def use_hook(rank, world_size):
    model, seen = in_groups(make(SGD), 2), []
    model.set_all_reduce_hook(lambda tensors: seen.extend(tensors))
    train(model, batch(rank, 0))
    model.sync()
    return model.device_mesh.mesh_dim_names, len(seen), len(model._stores())


def test_a_hook_is_given_what_is_shared(ranks):
    for names, seen, parts in ranks(4, use_hook):
        assert names == ("replicate", "shard")
        assert seen == parts


def move(rank, world_size, options):
    plain, model = make(SGD), in_groups(make(SGD), 2, **options)
    for step in range(3):
        train(model, batch(rank, step))
        train(plain, batch(0, step, world_size))
        model.sync()
        if step == 1:
            model.reshard(PATH, dict(plan_for_a_group(make(SGD), 2, which=1).plan[PATH]))
    assert_equals(model, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sync_gradients", [False, True])
def test_tables_move_within_each_group(ranks, sync_gradients):
    ranks(4, move, {"sync_gradients": sync_gradients})


def refuse(rank, world_size):
    world, plan = dist.group.WORLD, ShardingPlan({PATH: EmbeddingModuleShardingPlan()})
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="1 ranks do not divide into groups of 2; take a"):
        DMPCollection(make(SGD), device, plan, 1, 2, world)
    with pytest.raises(ValueError, match="world_size 3, 1 ranks in global_pg and 1 in all"):
        DMPCollection(make(SGD), device, plan, 3, 1, world)
    with pytest.raises(ValueError, match="got 1 submodule_configs; give all"):
        DMPCollection(make(SGD), device, plan, 1, 1, world, submodule_configs=[object()])


def test_what_cannot_be_is_refused(ranks):
    ranks(1, refuse)
