"""A sharded model equals the plain one that is fed the ranks' batches one after another.

One model has a table for every placement, pooling and way of answering, so a run compares all of
them at once, beside one another as in any real plan. Runs differ in rule, way of backward, number
format, ranks and kind of batch. What must agree to the bit is compared to the bit.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import LAMB, Adam, RowWiseAdagrad, in_backward
from shardwise.sharding import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    Slice,
    answered,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    shard,
    slices,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from shardwise.sharding.plan import table_configs
from shardwise.tables import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    PoolingType,
)

ROWS, WIDTH, STEPS = 13, 8, 3
PLACEMENTS = (
    *("data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise"),
    *("table_column_wise", "grid", "uneven", "hand_made"),
)
WHOLE_ROWS = ("data_parallel", "table_wise", "column_wise", "table_column_wise")
RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "row_wise_adagrad": (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-3}),
    "adam": (Adam, {"lr": 0.1, "eps": 1e-2}),
    "lamb": (LAMB, {"lr": 0.1, "eps": 1e-2}),
}
PLAIN_RULES = {**RULES, "adam": (torch.optim.Adam, {"lr": 0.1, "eps": 1e-2})}
ONE_HOST, TWO_HOSTS = "one host", "two hosts"


@dataclass(frozen=True)
class Run:
    """What distinguishes one comparison from another."""

    rule: str
    way: str  # backward, step, plain
    data_type: DataType
    is_variable: bool = False
    placements: tuple[str, ...] = PLACEMENTS
    hosts: str = ONE_HOST


def builder(placement: str, name: str, ranks: int, hosts: list[tuple[int, ...]]):
    """The builder of a placement over some ranks; `name` is the table's."""
    last = ranks - 1
    cut = [0, *(2 * r + 1 for r in range(1, ranks)), ROWS]  # 3, 2, ..., the rest
    uneven = [(b - a) for a, b in itertools.pairwise(cut)][::-1]
    if placement == "hand_made":  # overlapping replicas, an empty slice, blocks of odd widths
        parts = [
            Slice(name, (0, 4), (0, 3), tuple(range(ranks))),
            Slice(name, (0, 4), (3, 8), (last,)),
            Slice(name, (4, 4), (0, 8), (0,)),
            Slice(name, (4, 13), (0, 5), tuple(sorted({0, last}))),
            Slice(name, (4, 13), (5, 8), (last // 2,)),
        ]
        return slices(parts)
    return {
        "data_parallel": data_parallel,
        "table_wise": lambda: table_wise(last),
        "row_wise": row_wise,
        "column_wise": lambda: column_wise(ranks=[last, 0]),
        "table_row_wise": lambda: table_row_wise(len(hosts) - 1),
        "table_column_wise": lambda: table_column_wise(len(hosts) - 1, size_per_rank=[3, 5]),
        "grid": lambda: grid_shard([0, len(hosts) - 1]),
        "uneven": lambda: row_wise((uneven, "cpu")),
    }[placement]()


class Model(nn.Module):
    """Bags, weighted bags and sequences, with a table per (placement, answer, pooling)."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        pairs = list(itertools.product(run.placements, ("partials", "rows")))
        self.bags = EmbeddingBagCollection(
            [
                bag_config(f"{placement}-{answer}-{pooling.value}", run, pooling)
                for placement, answer in pairs
                for pooling in (PoolingType.SUM, PoolingType.MEAN)
            ]
        )
        self.weighted = EmbeddingBagCollection(
            [
                bag_config(f"{placement}-{answer}-{pooling.value}", run, pooling)
                for (placement, answer), pooling in zip(
                    pairs, itertools.cycle((PoolingType.SUM, PoolingType.MEAN)), strict=False
                )
            ],
            is_weighted=True,
        )
        self.sequences = EmbeddingCollection(
            [
                EmbeddingConfig(
                    ROWS, WIDTH, f"{p}-rows-x", run.data_type, feature_names=["own", "shared"]
                )
                for p in run.placements
            ]
        )

    def forward(self, batch: KeyedJaggedTensor) -> list[torch.Tensor]:
        sequences = self.sequences(batch)
        return [
            self.bags(batch).values(),
            self.weighted(batch).values(),
            torch.cat([vectors.values() for vectors in sequences.values()]),
        ]


def bag_config(name: str, run: Run, pooling: PoolingType) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        ROWS, WIDTH, name, run.data_type, feature_names=["own", "shared"], pooling=pooling
    )


def plan_of(model: Model, ranks: int, hosts: list[tuple[int, ...]]) -> ShardingPlan:
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                module,
                {
                    config.name: answered(
                        builder(config.name.split("-")[0], config.name, ranks, hosts),
                        config.name.split("-")[1],
                    )
                    for config in configs
                },
                local_size=len(hosts[0]),
                world_size=ranks,
                device_type="cpu",
            )
            for path, module, configs in (
                ("bags", model.bags, model.bags.embedding_bag_configs()),
                ("weighted", model.weighted, model.weighted.embedding_bag_configs()),
                ("sequences", model.sequences, model.sequences.embedding_configs()),
            )
        }
    )


# ---- batches


def make_batch(rank: int, step: int, is_variable: bool) -> KeyedJaggedTensor:
    """The batch of a rank: repeated ids, empty bags, and on rank 1 no sample in step 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 0 if (rank, step) == (1, 1) else 3 + rank
    strides = [size, size]
    if is_variable and size:
        strides = [2 + rank % 2, 3]
    lengths = torch.randint(0, 4, (sum(strides),), generator=generator)
    count = int(lengths.sum())
    ids = torch.randint(0, ROWS, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) + 0.5
    inverse = None
    if is_variable:
        rows = [torch.randint(0, max(n, 1), (size,), generator=generator) for n in strides]
        inverse = (["own", "shared"], torch.stack(rows))
    return KeyedJaggedTensor(
        ["own", "shared"],
        ids,
        weights=weights,
        lengths=lengths,
        stride=None if is_variable else size,
        stride_per_key_per_rank=[[n] for n in strides] if is_variable else None,
        inverse_indices=inverse,
    )


def join(batches: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """One batch of the samples of several, in order."""
    is_variable = batches[0].variable_stride_per_key()
    lengths, ids, weights, strides, inverse = [], [], [], [], []
    for key in range(2):
        first = 0
        for batch in batches:
            count, size = batch.length_per_key()[key], batch.stride_per_key()[key]
            start = sum(batch.length_per_key()[:key])
            bag = sum(batch.stride_per_key()[:key])
            ids.append(batch.values()[start : start + count])
            weights.append(batch.weights()[start : start + count])
            lengths.append(batch.lengths()[bag : bag + size])
            if is_variable:
                inverse.append(batch.inverse_indices()[1][key] + first)
            first += size
        strides.append(first)
    size = sum(batch.stride() for batch in batches)
    return KeyedJaggedTensor(
        ["own", "shared"],
        torch.cat(ids),
        weights=torch.cat(weights),
        lengths=torch.cat(lengths),
        stride=None if is_variable else size,
        stride_per_key_per_rank=[[n] for n in strides] if is_variable else None,
        inverse_indices=(["own", "shared"], torch.cat(inverse).view(2, -1))
        if is_variable
        else None,
    )


def own_rows(flat: torch.Tensor, batches: list[KeyedJaggedTensor], rank: int, kind: int):
    """The part of an output of the joined batch that is of one rank's samples."""
    if kind < 2:
        sizes = [batch.stride() for batch in batches]
        return flat.split(sizes)[rank]
    num_tables = flat.shape[0] // max(1, sum(batch.values().numel() for batch in batches))
    counts = [batch.length_per_key()[key] for key in range(2) for batch in batches]
    pieces = flat.split(counts * num_tables)
    chosen = [pieces[i] for i in range(len(pieces)) if i % len(batches) == rank]
    return torch.cat(chosen)


# ---- a comparison


def make_model(run: Run) -> Model:
    torch.manual_seed(7)
    return Model(run)


def bind(run: Run, model: Model) -> torch.optim.Optimizer:
    """Make the optimizer of a model."""
    torch.manual_seed(11)  # of random rounding
    if run.way == "plain":
        optimizer_class, options = PLAIN_RULES[run.rule]
        return optimizer_class(model.parameters(), **options)
    optimizer_class, options = RULES[run.rule]
    return in_backward(model, optimizer_class, when=run.way, **options)


def compare(rank: int, ranks: int, run: Run, plan=None, hosts=()) -> list[str]:
    """Train both models for some steps, and name what differs."""
    hosts = list(hosts) or hosts_of(ranks, run.hosts)
    env = ShardingEnv(ranks, rank, torch.distributed.group.WORLD, hosts=tuple(hosts))
    plain, sharded = make_model(run), make_model(run)
    plain_optimizer = bind(run, plain)
    is_bound_before = run.way != "plain" and not run.is_variable  # either must be the same
    optimizer = bind(run, sharded) if is_bound_before else None
    shard(sharded, plan or plan_of(sharded, ranks, hosts), env)
    optimizer = optimizer or bind(run, sharded)
    failures = []
    for step in range(STEPS):
        batches = [make_batch(other, step, run.is_variable) for other in range(ranks)]
        outputs, expected = sharded(batches[rank]), plain(join(batches))
        generator = torch.Generator().manual_seed(step)
        factors = [torch.rand(out.shape, generator=generator) - 0.4 for out in expected]
        own = [own_rows(f, batches, rank, kind) for kind, f in enumerate(factors)]
        for kind, out in enumerate(outputs):
            wanted = own_rows(expected[kind], batches, rank, kind)
            failures += differences(f"step {step}, output {kind}", out, wanted, run, False)
            if step == 0 and kind < 2:
                failures += pooled_differences([plain.bags, plain.weighted][kind], out, wanted)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        sum((out * f).sum() for out, f in zip(outputs, own, strict=True)).backward()
        sum((out * f).sum() / ranks for out, f in zip(expected, factors, strict=True)).backward()
        optimizer.step()
        plain_optimizer.step()
    failures += compare_tables(run, plain, sharded)
    if run.way == "plain":
        failures += compare_plain_states(run, plain, plain_optimizer, sharded, optimizer)
    return [f"rank {rank} of {ranks}, {run.hosts}, {run}: {text}" for text in failures]


def hosts_of(ranks: int, hosts: str) -> list[tuple[int, ...]]:
    size = ranks // 2 if hosts == TWO_HOSTS else ranks
    return [tuple(range(first, first + size)) for first in range(0, ranks, size)]


def stores_of(plain: Model, sharded: Model):
    for (path, whole), (_, part) in zip(
        plain.named_children(), sharded.named_children(), strict=True
    ):
        for store in part.stores:
            yield f"{path}.{store.config.name}", whole.stores[store.key], store


def compare_tables(run: Run, plain: Model, sharded: Model) -> list[str]:
    """Compare the slices here, and what their rules keep, with those of the plain tables."""
    failures = []
    for name, whole, store in stores_of(plain, sharded):
        is_exact = is_equal_to_the_bit(run, store.config.name)
        failures += differences(name, store.weight, store.cut(whole.weight), run, is_exact)
        if store.states.keys() != whole.states.keys():
            failures.append(f"{name}: states {[*store.states]}, not {[*whole.states]}")
        for kind, state in store.states.items():
            wanted = store.cut(whole.states[kind])
            failures += differences(f"{name} {kind}", state, wanted, run, is_exact)
    return failures


def is_equal_to_the_bit(run: Run, table: str) -> bool:
    """Element-wise rules, sent as partials, whose gradients are summed in one place.

    Between hosts partials may go by relay, which sums in another order.
    """
    placement, answer, _ = table.split("-")
    return (
        run.rule in ("sgd", "adam")
        and run.way != "plain"
        and answer == "partials"
        and placement not in ("data_parallel", "hand_made")
        and run.hosts == ONE_HOST
        and run.data_type is DataType.FP32
    )


def pooled_differences(module: nn.Module, got, wanted) -> list[str]:
    """Compare, to the bit, what comes of tables whose rows each lie in one place."""
    names = [config.name for config in table_configs(module) for _ in config.feature_names]
    blocks = zip(names, got.split(WIDTH, 1), wanted.split(WIDTH, 1), strict=True)
    return [
        f"output of {name}: not equal to the bit"
        for name, ours, theirs in blocks
        if name.split("-")[0] in WHOLE_ROWS and not torch.equal(ours, theirs)
    ]


def compare_plain_states(run, plain, plain_optimizer, sharded, optimizer) -> list[str]:
    failures = []
    for name, whole, store in stores_of(plain, sharded):
        state = optimizer.state.get(store.weight, {}) if store.weight.numel() else {}
        for kind, value in state.items():
            wanted = plain_optimizer.state[whole.weight][kind]
            if wanted.dim() == 2:
                columns = store.cut(whole.weight).shape[1]
                wanted = store.cut(wanted.expand(-1, WIDTH))[:, : max(1, value.shape[1])]
                assert value.shape[1] in (1, columns)
            failures += differences(f"{name} {kind}", value, wanted, run, False)
    return failures


def differences(name, got, wanted, run: Run, is_exact: bool) -> list[str]:
    if got.shape != wanted.shape:
        return [f"{name}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"]
    got, wanted = got.detach().float(), wanted.detach().float()
    if is_exact and not torch.equal(got, wanted):
        return [f"{name}: not equal to the bit, by {(got - wanted).abs().max():.2e}"]
    limit = 1e-5 if run.data_type is DataType.FP32 else 2.0**-6
    wrong = (got - wanted).abs() > limit * (wanted.abs() + 0.3)
    if not (torch.isfinite(got).all() and not wrong.any()):
        return [f"{name}: {int(wrong.sum())} differ, by up to {(got - wanted).abs().max():.2e}"]
    return []


def compare_all(rank: int, ranks: int, runs: list[Run]) -> list[str]:
    return [text for run in runs for text in compare(rank, ranks, run)]


# ---- the grid

GRID = [
    Run(rule, way, data_type, is_variable)
    for rule, way in itertools.product(RULES, ("backward", "step", "plain"))
    for data_type in (DataType.FP32, DataType.BF16)
    for is_variable in (False, True)
    if (rule, way) != ("lamb", "plain")  # PyTorch has no LAMB
]
SAMPLE = [
    Run("sgd", "plain", DataType.FP32, True),
    Run("row_wise_adagrad", "backward", DataType.FP32),
    Run("adam", "step", DataType.BF16),
    Run("lamb", "backward", DataType.FP32, True),
    Run("row_wise_adagrad", "plain", DataType.BF16),
    Run("row_wise_adagrad", "step", DataType.FP32, True),
]
LAYOUTS = [(1, ONE_HOST), (2, ONE_HOST), (4, ONE_HOST), (4, TWO_HOSTS)]


@pytest.mark.parametrize(("world_size", "hosts"), LAYOUTS)
def test_all_placements_together_train_as_the_plain_model(ranks, world_size, hosts):
    runs = [replace(run, hosts=hosts) for run in (SAMPLE if world_size > 1 else SAMPLE[:2])]
    assert ranks(world_size, compare_all, runs) == [[]] * world_size


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_alone_trains_as_the_plain_model(ranks, placement):
    run = Run("row_wise_adagrad", "backward", DataType.FP32, placements=(placement,))
    runs = [replace(run, hosts=hosts) for hosts in (ONE_HOST, TWO_HOSTS)]
    assert ranks(4, compare_all, runs) == [[]] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "hosts"), LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_full_grid_trains_as_the_plain_model(ranks, rule, world_size, hosts):
    runs = [replace(run, hosts=hosts) for run in GRID if run.rule == rule]
    assert ranks(world_size, compare_all, runs, timeout_s=120.0) == [[]] * world_size


# ---- any plan at all


@st.composite
def tilings(draw, ranks: int):
    """Blocks (rows, columns, ranks) that tile a table: uneven, replicated, some of them empty."""

    def tile(rows, columns, depth):
        across = draw(st.sampled_from(["leaf", "rows", "columns"] if depth else ["leaf"]))
        first, last = rows if across == "rows" else columns
        if across == "leaf" or last - first < 2:
            holders = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
            return [(rows, columns, tuple(sorted(holders)))]
        cut = draw(st.integers(first, last))
        halves = [(first, cut), (cut, last)]
        if across == "rows":
            return [block for half in halves for block in tile(half, columns, depth - 1)]
        return [block for half in halves for block in tile(rows, half, depth - 1)]

    return tile((0, ROWS), (0, WIDTH), 3)


@st.composite
def random_runs(draw):
    """A run, the ranks and hosts, and a tiling per table."""
    num_ranks = draw(st.integers(1, 4))
    order = draw(st.permutations(range(num_ranks)))
    cuts = draw(st.sets(st.integers(1, num_ranks), max_size=2)) | {num_ranks}
    bounds = [0, *sorted(cuts)]
    hosts = [tuple(sorted(order[a:b])) for a, b in itertools.pairwise(bounds)]
    run = draw(st.sampled_from([r for r in GRID if r.data_type is DataType.FP32]))
    run = replace(run, placements=("random",), hosts=TWO_HOSTS)
    tables = {
        path: [draw(tilings(num_ranks)) for _ in range(count)]
        for path, count in (("bags", 4), ("weighted", 2), ("sequences", 1))
    }
    return num_ranks, hosts, run, tables


def compare_random(rank, ranks, run, hosts, tables) -> list[str]:
    model = Model(run)
    plan = {}
    for path, module in model.named_children():
        plan[path] = EmbeddingModuleShardingPlan()
        for config, blocks in zip(table_configs(module), tables[path], strict=True):
            own = ParameterSharding.from_slices([Slice(config.name, *block) for block in blocks])
            plan[path][config.name] = replace(own, answer=config.name.split("-")[1])
    return compare(rank, ranks, run, ShardingPlan(plan), hosts)


@settings(max_examples=12)
@given(random_runs())
def test_any_plan_trains_as_the_plain_model(ranks, drawn):
    world_size, hosts, run, tables = drawn
    assert ranks(world_size, compare_random, run, hosts, tables) == [[]] * world_size
