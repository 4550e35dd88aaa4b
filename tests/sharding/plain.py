"""Compares an exchange with the plain lookup fed the ranks' batches one after another."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.ops.lookup import (
    RULES,
    BadIds,
    Ids,
    Pooling,
    Settings,
    Update,
    apply_update,
    lookup,
    plan_backward,
    restrict,
)
from shardwise.sharding.codecs import Codecs
from shardwise.sharding.environment import equal_hosts
from shardwise.sharding.exchange import Exchange
from shardwise.sharding.layout import Cell
from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire

SUM, MEAN, NONE = (int(pooling) for pooling in Pooling)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        placements: Of the tables.
        features: (input, table, pooling).
        rule: Name of the rule.
        when: backward, step, or dense or sparse gradients without a rule.
        is_weighted: Whether ids have weights that want gradients.
        is_variable: Whether inputs differ in their bags, so that the result lies in blocks.
        num_hosts: Hosts of equally many ranks.
    """

    placements: tuple[Placement, ...]
    features: tuple[tuple[int, int, int], ...]
    rule: str = "sgd"
    when: str = "backward"
    is_weighted: bool = False
    is_variable: bool = False
    num_hosts: int = 1
    bad_ids: BadIds = BadIds.RAISE
    codecs: Codecs = Codecs()  # noqa: RUF009  # frozen
    steps: int = 3
    bag_length: int = 4
    settings: Settings = Settings(eps=1e-2, weight_decay=0.01)  # noqa: RUF009  # frozen

    @property
    def numbers(self) -> Tensor:
        rows = [(k, t, p, self.placements[t].num_columns) for k, t, p in self.features]
        return torch.tensor(rows)

    @property
    def columns(self) -> bool:
        return not self.is_variable and all(pooling != NONE for _, _, pooling in self.features)


# ---- batches


def draw(case: Case, rank: int, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Give (lengths, ids, weights) of each input; rank 1 has no sample in step 1."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    batch = []
    for key in range(1 + max(k for k, _, _ in case.features)):
        rows = min(case.placements[t].num_rows for k, t, _ in case.features if k == key)
        size = 0 if (rank, step) == (1, 1) else 3 + rank + key * case.is_variable
        lengths = torch.randint(0, case.bag_length, (size,), generator=generator)
        count = int(lengths.sum())
        beyond = 0 if case.bad_ids == BadIds.RAISE else 5
        ids = torch.randint(-beyond, rows + beyond, (count,), generator=generator)
        batch.append((lengths, ids, torch.rand(count, generator=generator) + 0.5))
    return batch


def as_call(case: Case, batch: list[tuple[Tensor, Tensor, Tensor]]) -> Ids:
    lengths, ids, weights = (torch.cat(part) for part in zip(*batch, strict=True))
    return Ids(
        ids=ids,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        weights=weights.requires_grad_(case.is_weighted) if case.is_weighted else torch.empty(0),
        is_weighted=case.is_weighted,
        features=case.numbers,
        bags=torch.tensor([[len(own)] for own, _, _ in batch]),
        columns=case.columns,
        bad_ids=int(case.bad_ids),
    )


def row_counts(case: Case, batch) -> list[int]:
    """The rows of each feature's output."""
    return [
        batch[k][1].numel() if pooling == NONE else batch[k][0].numel()
        for k, _, pooling in case.features
    ]


def shape_of(case: Case, batch) -> tuple[int, int]:
    widths = case.numbers[:, 3].tolist()
    counts = row_counts(case, batch)
    if case.columns:
        return counts[0], sum(widths)
    return sum(n * width for n, width in zip(counts, widths, strict=True)), 1


def of_rank(case: Case, flat: Tensor, batches, rank: int) -> Tensor:
    """The part of the joined batch's output that is of one rank's samples."""
    counts = [row_counts(case, batch) for batch in batches]
    if case.columns:
        return flat.split([own[0] for own in counts])[rank]
    widths = case.numbers[:, 3].tolist()
    sizes = [own[f] * widths[f] for f in range(len(widths)) for own in counts]
    pieces = flat.split(sizes)
    return torch.cat(pieces[rank :: len(batches)])


# ---- rules


def bind(case: Case, slots: list[tuple[int, int, int, int]], tables: list[Tensor]) -> Update:
    rule = next(rule for rule in RULES if rule.name == case.rule)
    shapes = [
        t.shape if kind == "element" else t.shape[:1] for t in tables for _, kind in rule.states
    ]
    return Update(
        rule=rule,
        settings=case.settings,
        tables=tuple(range(len(tables))),
        features=torch.empty(0, 4, dtype=torch.int64),
        states=[torch.zeros(shape) for shape in shapes],
        steps=torch.zeros(len(tables), dtype=torch.int64),
        slots=torch.tensor(slots),
        lr=torch.tensor(0.1),
        in_backward=case.when == "backward",
    )


def step_with(case: Case, update: Update, tables: list[Tensor]) -> None:
    """Do what an optimizer does between two batches."""
    with torch.no_grad():
        if case.when == "step":
            grads = [table.grad for table in tables]
            apply_update(
                update, tables, [g._indices()[0] for g in grads], [g._values() for g in grads]
            )
        elif case.when != "backward":
            for table in tables:
                table -= 0.1 * (table.grad.to_dense() if table.grad.is_sparse else table.grad)
    for table in tables:
        table.grad = None


# ---- the comparison


@dataclass
class Difference:
    """The largest differences, over the largest value, on all ranks."""

    outputs: float = 0.0
    rows: float = 0.0
    states: float = 0.0
    weights: float = 0.0


def gap(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape, f"{tuple(got.shape)}, not {tuple(wanted.shape)}"
    if not got.numel():
        return 0.0
    assert torch.isfinite(got).all()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def cut(value: Tensor, cell: Cell) -> Tensor:
    """The part of a table, or of a value per row, that is a slice's."""
    part = cell.part
    rows = value[part.first_row : part.first_row + part.num_rows]
    right = part.first_column + part.num_columns
    return rows if value.dim() == 1 else rows[:, part.first_column : right]


def connect(case: Case, ranks: int) -> Wire:
    hosts = equal_hosts(ranks, ranks // case.num_hosts)
    return Wire(torch.distributed.group.WORLD, name="test", hosts=hosts)


def shard(
    case: Case, wire: Wire, tables: list[Tensor], path: str = ""
) -> tuple[Exchange, list[Tensor], Update]:
    """The exchange of a case with this rank's slices and the rule for them."""
    exchange = Exchange(case.numbers, case.placements, wire, path=path, codecs=case.codecs)
    slices = [
        cut(tables[cell.table].detach(), cell).clone().requires_grad_() for cell in exchange.cells
    ]
    slots = [
        (c.table, c.part.first_row, c.part.first_column, case.placements[c.table].num_columns)
        for c in exchange.cells
    ]
    return exchange, slices, exchange.at_step(bind(case, slots, slices))


def compare(rank: int, ranks: int, case: Case) -> Difference:
    """Train both for some steps."""
    torch.manual_seed(5)
    whole = [torch.randn(p.num_rows, p.num_columns).requires_grad_() for p in case.placements]
    features, is_sparse = case.numbers, case.when == "sparse"
    update = bind(case, [(t, 0, 0, p.num_columns) for t, p in enumerate(case.placements)], whole)
    update = replace(update, features=restrict(features, update.tables))
    own_rule = case.when in ("backward", "step")
    way = plan_backward(features, len(whole), [update] if own_rule else [], is_sparse=is_sparse)

    exchange, slices, own_update = shard(case, connect(case, ranks), whole)
    own_way = exchange.plan_backward([own_update] if own_rule else [], is_sparse=is_sparse)

    result = Difference()
    for step in range(case.steps):
        batches = [draw(case, other, step) for other in range(ranks)]
        joined = [
            tuple(torch.cat(part) for part in zip(*inputs, strict=True))
            for inputs in zip(*batches, strict=True)
        ]
        call, every = as_call(case, batches[rank]), as_call(case, joined)
        out = exchange(call, shape_of(case, batches[rank]), slices, own_way, lambda error: error)
        wanted = lookup(whole, every, shape_of(case, joined), way=way)
        result.outputs = max(result.outputs, gap(out, of_rank(case, wanted, batches, rank)))
        factor = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(step))
        (out * of_rank(case, factor, batches, rank)).sum().backward()
        (wanted * factor / ranks).sum().backward()
        if case.is_weighted:
            mine = [
                own
                for inputs in zip(*batches, strict=True)
                for own in (b[1].numel() for b in inputs)
            ]
            wanted_grad = torch.cat((every.weights.grad * ranks).split(mine)[rank::ranks])
            result.weights = max(result.weights, gap(call.weights.grad, wanted_grad))
        step_with(case, own_update, slices)
        step_with(case, update, whole)
    count = len(update.rule.states)
    for n, cell in enumerate(exchange.cells):
        t = cell.table
        result.rows = max(result.rows, gap(slices[n], cut(whole[t], cell)))
        for k in range(count):
            state, wanted = own_update.states[n * count + k], update.states[t * count + k]
            result.states = max(result.states, gap(state, cut(wanted, cell)))
        if own_rule:
            assert own_update.steps[n] == update.steps[t] == case.steps
    return result


def differences(ranks, world_size: int, case: Case) -> Difference:
    """The largest differences over ranks."""
    every = ranks(world_size, compare, case)
    names = ("outputs", "rows", "states", "weights")
    return Difference(*(max(getattr(one, name) for one in every) for name in names))


# ---- placements


def grid(name: str, rows, columns, cells, **options) -> Placement:
    """A placement by its cuts, and the ranks of each cell: a number, or several."""
    ranks = tuple(
        tuple(cell if isinstance(cell, tuple) else (cell,) for cell in row) for row in cells
    )
    return Placement(name, tuple(rows), tuple(columns), ranks, **options)


def whole(name: str, rank: int, **options) -> Placement:
    return grid(name, (0, 13), (0, 8), [[rank]], **options)


def by_rows(name: str, world_size: int, **options) -> Placement:
    cuts = (0, *(3 * r + 1 for r in range(1, world_size)), 13)
    return grid(name, cuts, (0, 8), [[rank] for rank in range(world_size)], **options)


def by_columns(name: str, world_size: int, **options) -> Placement:
    return grid(name, (0, 13), (0, 3, 8), [[world_size - 1, 0]], **options)


def everywhere(name: str, world_size: int) -> Placement:
    return grid(name, (0, 13), (0, 8), [[tuple(range(world_size))]])
