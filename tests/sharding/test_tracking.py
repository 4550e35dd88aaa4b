"""Changed rows of sharded tables: all ranks together tell what the plain model would, once."""

import pytest
import torch
from torch import nn
from torch.distributed import GroupMember

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import in_backward
from shardwise.sharding import (
    DistributedModelParallel,
    ShardingEnv,
    construct_module_sharding_plan,
    shard,
)
from shardwise.sharding.plan import ShardingPlan, table_configs
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    ModelDeltaTracker,
    ModelTrackerConfig,
    TrackingMode,
)
from tests.sharding.test_equality import ONE_HOST, PLACEMENTS, ROWS, TWO_HOSTS, builder, hosts_of

OPTIMIZERS = {
    "backward": lambda model: in_backward(model, torch.optim.Adam, lr=0.1),
    "step": lambda model: in_backward(model, torch.optim.Adam, lr=0.1, when="step"),
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            [EmbeddingBagConfig(ROWS, 8, p, feature_names=["x", p]) for p in PLACEMENTS]
        )
        self.sequences = EmbeddingCollection(
            [EmbeddingConfig(ROWS, 8, f"{p}_", feature_names=["x", p]) for p in PLACEMENTS]
        )

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        sequences = self.sequences(batch).values()
        return self.bags(batch).values().sum() + sum(one.values().sum() for one in sequences)


def plan_of(model: Model, ranks: int, hosts: list[tuple[int, ...]]) -> ShardingPlan:
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                module,
                {
                    config.name: builder(config.name.strip("_"), config.name, ranks, hosts)
                    for config in table_configs(module)
                },
                local_size=len(hosts[0]),
                world_size=ranks,
                device_type="cpu",
            )
            for path, module in model.named_children()
        }
    )


def ids_of(rank: int, step: int) -> dict[str, list[int]]:
    """The ids of a rank's batch by feature: one that all tables read, and one for each."""
    own = {p: [(3 * step + number + 5 * rank) % ROWS] for number, p in enumerate(PLACEMENTS)}
    return {"x": [] if rank == 1 else [step, step], **own}


def make_batch(ids: dict[str, list[int]]) -> KeyedJaggedTensor:
    values = torch.tensor([one for own in ids.values() for one in own])
    return KeyedJaggedTensor(
        [*ids], values, lengths=torch.tensor([len(own) for own in ids.values()])
    )


def track(rank: int, ranks: int, layout: str, way: str):
    """Train, reading every second step; give the reads and the model as it is then."""
    torch.manual_seed(0)
    model, hosts = Model(), hosts_of(ranks, layout)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    env = ShardingEnv(ranks, rank, GroupMember.WORLD, hosts=tuple(hosts))
    shard(model, plan_of(model, ranks, hosts), env)
    optimizer = OPTIMIZERS[way](model)
    mode = TrackingMode.EMBEDDING if way == "plain" else TrackingMode.OPTIMIZER_STATE
    tracker, reads = ModelDeltaTracker(model, mode=mode), []
    for step in range(4):
        optimizer.zero_grad()
        model(make_batch(ids_of(rank, step))).backward()
        optimizer.step()
        if step % 2:
            reads.append(list(tracker.get_delta().values()))
    end = {name: value.full() for name, value in model.state_dict().items()}
    states = {}
    if way != "plain":
        states = {
            name: {kind: getattr(v, "full", v.clone)() for kind, v in state.items()}
            for name, state in optimizer.state_dict()["state"].items()
        }
    return reads, start, end, states


def changed(placement: str, ranks: int, steps: list[int]) -> list[int]:
    """The rows of a table that some steps of all ranks change, by the batches alone."""
    found = [ids_of(rank, step) for rank in range(ranks) for step in steps]
    return sorted({one for ids in found for feature in ("x", placement) for one in ids[feature]})


@pytest.mark.parametrize(
    ("world_size", "hosts", "way"),
    [
        (1, ONE_HOST, "backward"),
        (2, ONE_HOST, "backward"),
        (2, ONE_HOST, "step"),
        (2, ONE_HOST, "plain"),
        (4, ONE_HOST, "plain"),
        (4, TWO_HOSTS, "backward"),
        (4, TWO_HOSTS, "step"),
    ],
)
def test_all_ranks_together_tell_every_change_once(ranks, world_size, hosts, way):
    every = ranks(world_size, track, hosts, way)
    _, copy, end, states = every[0]
    old = {name: {kind: torch.zeros_like(v) for kind, v in s.items()} for name, s in states.items()}
    for number, steps in enumerate(([0, 1], [2, 3])):
        times = {name: torch.zeros(table.shape) for name, table in copy.items()}
        for delta in (one for reads, *_ in every for one in reads[number]):
            columns = slice(delta.first_column, delta.first_column + delta.states.shape[1])
            times[delta.key][delta.ids, columns] += 1
            delta.apply_to(copy, old)
        for name, count in times.items():
            expected = torch.zeros(count.shape)
            expected[changed(name.split(".")[-2].strip("_"), world_size, steps)] = 1
            assert torch.equal(count, expected), name
    assert all(torch.equal(copy[name], value) for name, value in end.items())
    for name, state in states.items():
        assert all(torch.equal(old[name][kind], value) for kind, value in state.items()), name


def track_in_parallel(rank, world_size):
    torch.manual_seed(0)
    model = nn.Sequential(EmbeddingBagCollection([EmbeddingBagConfig(8, 4, "t")]))
    in_backward(model, torch.optim.SGD, lr=0.1)
    config = ModelTrackerConfig(consumers=["a", "b"])
    model = DistributedModelParallel(model, model_tracker_config=config)
    batch = KeyedJaggedTensor(["t"], torch.tensor([rank, 5]), lengths=torch.tensor([1, 1]))
    model(batch).values().sum().backward()
    tracker = model.get_model_tracker()
    return [tracker.get_delta_ids(consumer) for consumer in ("a", "a", "b")]


def test_the_config_of_a_parallel_model_makes_its_tracker(ranks):
    found = ranks(2, track_in_parallel)
    for read, expected in enumerate(([0, 1, 5], [], [0, 1, 5])):
        together = [one for reads in found for one in reads[read]["0.embedding_bags.t"].tolist()]
        assert sorted(together) == expected


def test_tables_that_are_cut_later_need_a_new_tracker():
    module = EmbeddingBagCollection([EmbeddingBagConfig(8, 4, "t")])
    tracker = ModelDeltaTracker(module)
    plan = construct_module_sharding_plan(
        module, {"t": builder("row_wise", "t", 1, [(0,)])}, world_size=1, device_type="cpu"
    )
    shard(module, plan, ShardingEnv.from_local(1, 0))
    with pytest.raises(RuntimeError, match="table 't' was cut anew"):
        tracker.get_delta_ids()
