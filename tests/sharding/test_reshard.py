"""Tables get another plan while they train, and training goes on as the plain model's does."""

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import Adam, RowWiseAdagrad, clip_grad_norm_, in_backward
from shardwise.sharding import (
    DistributedModelParallel,
    ShardingEnv,
    ShardingPlan,
    Slice,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    reshard,
    reshard_cost,
    row_wise,
    shard,
    slices,
    table_row_wise,
    table_wise,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

ROWS = {"a": 13, "b": 6}
RULES = {"rowwise_adagrad": RowWiseAdagrad, "adam": Adam}


def uneven(name, ranks):
    """Columns cut at 3; the first rows on two ranks, the others on the last."""
    first, rows = tuple(sorted({0, ranks - 1})), ROWS[name]
    parts = [((0, 4), (0, 3), first), ((0, 4), (3, 8), (ranks - 1,)), ((4, rows), (0, 8), (0,))]
    return slices([Slice(name, *part) for part in parts])


BUILDERS = {
    "data_parallel": lambda name, ranks: data_parallel(),
    "table_wise": lambda name, ranks: table_wise(ranks - 1),
    "first": lambda name, ranks: table_wise(0),
    "row_wise": lambda name, ranks: row_wise(),
    "column_wise": lambda name, ranks: column_wise(ranks=[ranks - 1, 0]),
    "table_row_wise": lambda name, ranks: table_row_wise(0),
    "grid": lambda name, ranks: grid_shard([0, max(0, ranks // 2 - 1)]),
    "uneven": uneven,
}


def make() -> nn.ModuleDict:
    torch.manual_seed(3)
    configs = [EmbeddingBagConfig(rows, 8, name) for name, rows in ROWS.items()]
    return nn.ModuleDict({"bags": EmbeddingBagCollection(configs)})


def make_plan(model, ranks, how) -> ShardingPlan:
    """A plan with the placement of table a, then that of b."""
    builders = {name: BUILDERS[kind](name, ranks) for name, kind in zip("ab", how, strict=True)}
    local_size = max(1, ranks // 2)
    options = {"local_size": local_size, "world_size": ranks, "device_type": "cpu"}
    return ShardingPlan(
        {"bags": construct_module_sharding_plan(model["bags"], builders, **options)}
    )


def make_batch(ranks, step) -> list[KeyedJaggedTensor]:
    """The batches of all ranks, and the one of all their samples."""
    generator = torch.Generator().manual_seed(step)
    ids = {n: torch.randint(0, r, (ranks, 6), generator=generator) for n, r in ROWS.items()}
    parts = [torch.cat([own[r] for own in ids.values()]) for r in range(ranks)]
    every = torch.cat([own.flatten() for own in ids.values()])
    return [
        KeyedJaggedTensor(["a", "b"], one, lengths=torch.full((one.numel() // 2,), 2))
        for one in (*parts, every)
    ]


def train(model, batch, optimizer, step, scale):
    optimizer.zero_grad()
    out = model["bags"](batch).values()
    generator = torch.Generator().manual_seed(step)
    factors = torch.rand(16, generator=generator)
    (out * factors).sum().mul(scale).backward()
    optimizer.step()


def differences(plain, sharded) -> float:
    """The largest difference of weights and states, as the state dicts have them."""
    found = []
    for key, value in plain.state_dict().items():
        found.append((sharded.state_dict()[key].full() - value).abs().max())
    wholes = {store.key: store for store in plain["bags"].stores}
    for store in sharded["bags"].stores:
        for kind, state in store.states.items():
            wanted = store.cut(wholes[store.key].states[kind])
            found.append((state - wanted).abs().max() if state.numel() else torch.zeros(()))
    return float(max(found))


def resharded(rank, ranks, rule, when, plans):
    env = ShardingEnv(ranks, rank, torch.distributed.group.WORLD)
    plain, sharded = make(), make()
    optimizers = [in_backward(m, RULES[rule], lr=0.1, when=when) for m in (plain, sharded)]
    shard(sharded, make_plan(sharded, ranks, plans[0]), env)
    step, costs = 0, []
    for how in plans:
        plan = make_plan(sharded, ranks, how)
        wire = sharded["bags"].layout.wire
        before, forecast = wire.traffic.copy(), reshard_cost(sharded, plan)
        optimizers[1].zero_grad()
        report = reshard(sharded, plan)
        moved = {tag: size for tag, size in (wire.traffic - before).items() if "moving" in tag}
        assert sum(moved.values()) == report.sent[rank] == forecast.sent[rank]
        assert report.tables == forecast.tables
        costs.append(report.total)
        for _ in range(2):
            batches = make_batch(ranks, step)
            train(plain, batches[-1], optimizers[0], step, 1 / ranks)
            train(sharded, batches[rank], optimizers[1], step, 1.0)
            step += 1
    return differences(plain, sharded), costs


WALKS = [
    (("table_wise", "row_wise"), ("row_wise", "column_wise"), ("grid", "data_parallel")),
    (("data_parallel", "uneven"), ("table_row_wise", "first"), ("uneven", "row_wise")),
]


@pytest.mark.parametrize("ranks_", [1, 2, 4])
@pytest.mark.parametrize("walk", WALKS)
def test_training_goes_on_as_without(ranks, ranks_, walk):
    for rule, when in (("rowwise_adagrad", "backward"), ("adam", "step")):
        for difference, costs in ranks(ranks_, resharded, rule, when, walk):
            assert difference < 1e-6
            assert costs[0] == 0  # the first plan is the one that it has
            assert all(cost > 0 for cost in costs[1:]) == (ranks_ > 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_training_goes_on_through_any_plans(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = [*BUILDERS]
    drawn = torch.randint(0, len(kinds), (5, 2), generator=generator).tolist()
    walk = [tuple(kinds[k] for k in pair) for pair in drawn]
    rule, when = [*RULES][seed % 2], ["backward", "step"][seed // 2 % 2]
    for difference, _ in ranks(4 - seed % 3, resharded, rule, when, walk):
        assert difference < 1e-6


def test_rules_at_the_step_forget_the_layout_before(ranks):
    walk = (("column_wise", "first"), ("data_parallel", "row_wise"))
    for difference, _ in ranks(2, resharded, "rowwise_adagrad", "step", walk):
        assert difference < 1e-6


def keep_what_stays(rank, ranks):
    model = make()
    shard(model, make_plan(model, ranks, ("row_wise", "table_wise")))
    before = dict(model.named_parameters())
    report = reshard(model, make_plan(model, ranks, ("row_wise", "first")))
    after = dict(model.named_parameters())
    same = [name for name in after if before[name] is after[name]]
    clip_grad_norm_(model.parameters(), 1.0)
    return same, report


def test_a_table_that_stays_keeps_its_parameter_and_others_move_whole(ranks):
    for same, report in ranks(2, keep_what_stays):
        assert same == ["bags.embedding_bags.a.weight"]
        assert report.tables == {"bags.b": 6 * 8 * 4}
        assert (report.sent, report.received) == ([0, 6 * 8 * 4], [6 * 8 * 4, 0])
        assert "1 tables move, 0.000 MB between ranks in" in str(report)


def keep_one_replica(rank, ranks):
    collection = make()["bags"]
    both = [Slice(name, (0, rows), (0, 8), (1, 2)) for name, rows in ROWS.items()]
    shard(collection, both)
    one = [Slice(name, (0, rows), (0, 8), (1,)) for name, rows in ROWS.items()]
    return reshard(collection, one).total


def test_what_a_rank_has_does_not_travel_to_it(ranks):
    assert ranks(3, keep_one_replica) == [0, 0, 0]


def hold_old_parameters(rank, ranks):
    model = make()
    shard(model, make_plan(model, ranks, ("row_wise", "first")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["bags"](make_batch(ranks, 0)[rank]).values().sum().backward()
    plan = make_plan(model, ranks, ("column_wise", "first"))
    with pytest.raises(ValueError, match="table 'a' has a gradient"):
        reshard(model, plan)
    optimizer.zero_grad()
    reshard(model, plan)
    with pytest.raises(RuntimeError, match="table 'a' as it was before `reshard` moved it"):
        optimizer.step()


def test_gradients_and_optimizers_that_would_be_lost_are_refused(ranks):
    ranks(2, hold_old_parameters)


def differ(rank, ranks):
    model = make()
    shard(model, make_plan(model, ranks, ("row_wise", "first")))
    before = model["bags"].layout
    how = ("column_wise", "first") if rank else ("table_wise", "first")
    with pytest.raises(ValueError, match="rank 1 has table 'a'"):
        reshard(model, make_plan(model, ranks, how))
    return model["bags"].layout is before


def test_plans_that_differ_move_nothing(ranks):
    assert ranks(2, differ) == [True, True]


def test_what_is_not_sharded_is_refused():
    model = make()
    with pytest.raises(ValueError, match="no sharded collection; call `shard` first"):
        reshard(model, make_plan(model, 1, ("row_wise", "first")))


def by_parameters(rank, ranks):
    model = make()
    plan = make_plan(model, ranks, ("row_wise", "table_wise"))
    dmp = DistributedModelParallel(model, plan=plan)
    changed = make_plan(model, ranks, ("column_wise", "first")).plan["bags"]
    report = dmp.reshard("bags", {"a": changed["a"]})
    assert dmp.plan.plan["bags"]["a"] == changed["a"]
    return [*report.tables]


def test_a_wrapped_model_takes_the_parameters_that_change(ranks):
    assert ranks(2, by_parameters) == [["bags.a"]] * 2
