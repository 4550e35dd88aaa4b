"""Look up rows of many tables in one call, and bring gradients back to them.

One operator family serves pooled and per-id lookups, weighted or not, of tables of any width, for
ids of one source or of many (see `reference`, the definition). Backward is exact: the gradients of
a row are summed first and the row is updated once per call, in one of three ways per table:

* an `Update` in backward: the rule runs inside backward and no gradient is stored;
* `sparse`: the gradient is a coalesced row-sparse tensor, for `optim.TableOptimizer` at its step;
* dense: a gradient of the table's size, for any PyTorch optimizer.

Two calls that read one table before one backward update it twice, one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwise.ops.library import register
from shardwise.ops.lookup import reference
from shardwise.ops.lookup.reference import Ids
from shardwise.ops.lookup.rules import RULES, SGD, Rule, Settings
from shardwise.ops.lookup.touched import is_watched, tell_touched

__all__ = [
    "RULES",
    "BadIds",
    "Complete",
    "Ids",
    "Pooling",
    "RowGrads",
    "Rule",
    "Settings",
    "Update",
    "Way",
    "advise_huge_pages",
    "apply_completed",
    "apply_update",
    "as_sparse",
    "count_bad_ids",
    "dense_grads",
    "is_watched",
    "lookup",
    "new_result",
    "plan_backward",
    "restrict",
    "row_grads",
    "run_update",
    "sparse_grads",
    "weight_grads",
]


class Pooling(IntEnum):
    """How the rows of a bag become one vector; NONE keeps one vector per id."""

    SUM = reference.SUM
    MEAN = reference.MEAN
    NONE = reference.NONE


class BadIds(IntEnum):
    """What to do with an id that is negative or past the table.

    RAISE refuses the call, CLIP takes the nearest row, HASH takes the id modulo the rows, IGNORE
    adds zeros (the id still counts in a mean) and counts the id per feature.
    """

    RAISE = reference.RAISE
    CLIP = reference.CLIP
    HASH = reference.HASH
    IGNORE = reference.IGNORE


def _fake_row_sums(grad: Tensor, *arguments: Any) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return grad.new_empty(count, RULES[arguments[12]].num_sums, dtype=torch.float32)


def _fake_row_grads(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows = grad.new_empty(context.new_dynamic_size(), dtype=torch.int64)
    flat = grad.new_empty(context.new_dynamic_size(), dtype=torch.float32)
    return rows, flat, torch.empty(len(arguments[8]), dtype=torch.int64)


_lookup = register(
    "lookup",
    reference=lambda *a: reference.lookup(Ids(*a[:8]), *a[8:]),
    fake=lambda *a: a[0].new_empty(a[9], a[10], dtype=torch.float32),
)
_count_bad_ids = register(
    "count_bad_ids",
    reference=lambda *a: reference.count_bad_ids(Ids(*a[:8]), *a[8:]),
    fake=lambda *a: a[0].new_empty(a[4].shape[0], dtype=torch.int64),
)
_update = register(
    "update_",
    reference=lambda grad, *a: reference.update_(
        grad, Ids(*a[:8]), reference.Rules(*a[8:14]), *a[14:]
    ),
    fake=lambda *a: None,
)
_row_sums = register(
    "row_sums",
    reference=lambda grad, *a: reference.row_sums(
        grad, Ids(*a[:8]), reference.Rules(*a[8:14]), *a[14:]
    ),
    fake=_fake_row_sums,
)
_row_grads = register(
    "row_grads",
    reference=lambda grad, *a: reference.row_grads(grad, Ids(*a[:8]), *a[8:]),
    fake=_fake_row_grads,
)
_weight_grads = register(
    "weight_grads",
    reference=lambda grad, *a: reference.weight_grads(grad, Ids(*a[:8]), *a[8:]),
    fake=lambda grad, *a: grad.new_empty(a[0].shape[0], dtype=torch.float32),
)
advise_huge_pages = register("advise_huge_pages", reference=lambda t: None, fake=lambda t: None)
new_result = register(
    "new_result",
    reference=lambda like, numel: like.new_empty(numel),
    fake=lambda like, numel: like.new_empty(numel),
)
"""A tensor [numel] without values, of a dtype and device, in memory that earlier results leave."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """An update rule bound to some tables of a lookup, with the state it keeps for them.

    Attributes:
        rule: What happens to a touched row.
        settings: The rule's numbers.
        tables: Which tables of the lookup it owns, ascending.
        features: The lookup's features, with table numbers counted within `tables`, and -1 for
            the features of other tables.
        states: The rule's states, table after table, float32.
        steps: Updates made so far [T], int64.
        slots: Per table [T, 4]: its key for random bits, the first row and first column that the
            local part holds, and the columns of the whole table.
        lr: The learning rate, a 0-d float32 tensor, read at each update.
        seed: For stochastic rounding of fp16 and bf16 rows; -1 rounds to nearest.
        in_backward: Run the rule in backward. Otherwise backward leaves a row-sparse gradient and
            `apply_update` runs it.
        complete: For parts of tables whose rows go on elsewhere: turns the row sums of the columns
            here into those of whole rows.
    """

    rule: Rule
    settings: Settings
    tables: tuple[int, ...]
    features: Tensor
    states: list[Tensor]
    steps: Tensor
    slots: Tensor
    lr: Tensor
    seed: int = -1
    in_backward: bool = True
    complete: "Complete | None" = None


Complete = Callable[[Tensor, Sequence[int]], Tensor]
"""From row sums [N, num_sums], table after table, and the distinct rows of each table."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """How gradients of a lookup reach its tables; made by `plan_backward`."""

    updates: tuple[Update, ...]
    """Rules that run in backward."""
    sparse: tuple[int, ...]
    """Tables whose gradient is row-sparse."""
    sparse_features: Tensor
    dense: tuple[int, ...]
    """Tables whose gradient is dense."""
    dense_features: Tensor


def restrict(features: Int[Tensor, "F 4"], tables: Sequence[int]) -> Int[Tensor, "F 4"]:
    """Number the tables of `features` within `tables`; -1 for the features of other tables."""
    result = features.clone()
    position = {table: i for i, table in enumerate(tables)}
    result[:, 1] = torch.tensor([position.get(t, -1) for t in features[:, 1].tolist()])
    return result


def plan_backward(
    features: Int[Tensor, "F 4"],
    num_tables: int,
    updates: Sequence[Update] = (),
    *,
    is_sparse: bool = False,
) -> Way:
    """Choose each table's way of backward.

    Args:
        features: The lookup's features.
        num_tables: Tables of the lookup.
        updates: Rules, each for some tables. Those not `in_backward` make gradients row-sparse.
        is_sparse: Row-sparse gradients, too, for the tables that no rule owns.

    Raises:
        ValueError: Two updates own one table.
    """
    owned = [table for update in updates for table in update.tables]
    if len(owned) != len(set(owned)):
        raise ValueError(f"two update rules own one table: {sorted(owned)}")
    fused = tuple(update for update in updates if update.in_backward)
    at_step = {t for update in updates if not update.in_backward for t in update.tables}
    plain = set(range(num_tables)) - set(owned)
    sparse = tuple(sorted(at_step | (plain if is_sparse else set())))
    dense = () if is_sparse else tuple(sorted(plain))
    return Way(
        updates=fused,
        sparse=sparse,
        sparse_features=restrict(features, sparse),
        dense=dense,
        dense_features=restrict(features, dense),
    )


_NO_SUMS = torch.empty(0)
_PLAIN_SUM = (SGD.code, Settings().as_floats(), -1, torch.tensor(-1.0), _NO_SUMS)


def run_update(
    grad: Tensor, call: Ids, update: Update, tables: Sequence[Tensor], sums: Tensor = _NO_SUMS
) -> None:
    """Run a rule on the rows that a call touched.

    Args:
        grad: The gradient of the lookup's result.
        call: What was looked up.
        update: The rule, for tables in the numbering of the lookup.
        tables: All tables of the lookup.
        sums: Row sums of whole rows, where the columns here are not all.
    """
    own = [tables[t] for t in update.tables]
    _update(
        grad,
        *call._replace(features=update.features),
        own,
        update.states,
        update.steps,
        update.slots,
        update.rule.code,
        update.settings.as_floats(),
        update.seed,
        update.lr,
        sums,
    )
    if not torch.compiler.is_compiling():  # traced code is given the version by the compiler
        torch.autograd.graph.increment_version(own)
        tell_touched(call._replace(features=update.features), own)


def dense_grads(grad: Tensor, call: Ids, way: Way, tables: Sequence[Tensor]) -> list[Tensor]:
    """Give the dense gradients of `way.dense`: SGD on zeros with a learning rate of -1."""
    result = [torch.zeros_like(tables[t]) for t in way.dense]
    count = len(result)
    steps = torch.zeros(count, dtype=torch.int64)
    slots = torch.zeros(count, 4, dtype=torch.int64)
    call = call._replace(features=way.dense_features)
    _update(grad, *call, result, [], steps, slots, *_PLAIN_SUM)
    return result


def sparse_grads(grad: Tensor, call: Ids, way: Way, tables: Sequence[Tensor]) -> list[Tensor]:
    """Give the row-sparse gradients of `way.sparse`, in order."""
    own = [tables[t] for t in way.sparse]
    found = row_grads(grad, call._replace(features=way.sparse_features), own)
    return [as_sparse(table, *pair) for table, pair in zip(own, found, strict=True)]


def as_sparse(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Make the gradient of a table that is 0 but in some distinct ascending rows."""
    result: Tensor = torch.sparse_coo_tensor(
        rows[None], values.to(table.dtype), table.shape, is_coalesced=True, check_invariants=False
    )
    return result


RowGrads = tuple[Tensor, Tensor]
"""Distinct rows of a table [N], ascending, and their gradients [N, D], float32."""


def row_grads(grad: Tensor, call: Ids, tables: Sequence[Tensor]) -> list[RowGrads]:
    """Sum the gradients of each row that a call touched; one entry per table."""
    rows, flat, counts = _row_grads(grad, *call, list(tables))
    sizes: list[int] = counts.tolist()
    widths = [table.shape[1] for table in tables]
    values = flat.split([n * width for n, width in zip(sizes, widths, strict=True)])
    shaped = [v.view(n, w) for v, n, w in zip(values, sizes, widths, strict=True)]
    return list(zip(rows.split(sizes), shaped, strict=True))


def weight_grads(grad: Tensor, call: Ids, tables: Sequence[Tensor]) -> Tensor:
    """Give the gradient [V] of the weights of a call."""
    result: Tensor = _weight_grads(grad, *call, list(tables))
    return result


class _Lookup(torch.autograd.Function):
    """The lookup, differentiable.

    Tables are inputs, so that the result requires grad, but attributes of `ctx`, not saved
    tensors: they may change between forward and backward (another call may update them).
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Ids,
        way: Way,
        shape: tuple[int, int],
        weights: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        call = call._replace(weights=weights)
        ctx.call, ctx.way, ctx.tables = call, way, tables
        result: Tensor = _lookup(*call, list(tables), *shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, call, way, tables = grads[0].contiguous(), ctx.call, ctx.way, ctx.tables
        weight_grad = None
        if ctx.needs_input_grad[3]:  # before any update: it reads the rows as forward saw them
            weight_grad = weight_grads(grad, call, tables).to(call.weights.dtype)
        by_table: dict[int, Tensor] = {}
        if way.dense:
            by_table |= zip(way.dense, dense_grads(grad, call, way, tables), strict=True)
        if way.sparse:
            by_table |= zip(way.sparse, sparse_grads(grad, call, way, tables), strict=True)
        for update in way.updates:
            run_update(grad, call, update, tables)
        return None, None, None, weight_grad, *map(by_table.get, range(len(tables)))


def lookup(
    tables: Sequence[Tensor],
    call: Ids,
    shape: tuple[int, int],
    *,
    way: Way,
) -> Float[Tensor, "rows width"]:
    """Look up every feature of a call.

    With `call.columns`, the result is [B, sum of widths], one column block per feature in order,
    for ids of one source and B bags per input. Otherwise it is filled block after block, [source]
    [feature], each block [bags, width] (with pooling NONE [ids, width]): any shape of that size.

    Args:
        tables: The tables [R, D], float32, float16 or bfloat16, in the numbering of the features.
        call: Ids and their layout, see `reference.Ids`. Weights are float32.
        shape: Shape of the result.
        way: How gradients reach the tables.

    Returns:
        float32, on the device of the ids. Sums are kept in float32.

    Raises:
        RuntimeError: Offsets do not partition the ids, or an id is outside its table. Nothing has
            been written then. CPU only.
    """
    needs_grad = torch.is_grad_enabled() and (
        call.weights.requires_grad or any(table.requires_grad for table in tables)
    )
    result: Tensor
    if needs_grad:
        result = cast(Any, _Lookup).apply(call, way, shape, call.weights, *tables)
    else:
        result = _lookup(*call, list(tables), *shape)
    return result


def count_bad_ids(tables: Sequence[Tensor], call: Ids, shape: tuple[int, int]) -> Int[Tensor, " F"]:
    """Count the ids of each feature that are negative or past their table."""
    result: Tensor = _count_bad_ids(*call, list(tables), *shape)
    return result


def apply_update(
    update: Update, tables: Sequence[Tensor], rows: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    """Run a rule on given row gradients; a row that occurs several times gets their sum.

    Args:
        update: The rule; `tables` and the others follow the order of its tables.
        tables: The tables [R, D]; changed in place.
        rows: Per table, row numbers [N].
        grads: Per table, gradients [N, D].
    """
    if update.complete is not None and not tables:
        apply_completed(update, tables, [])
        return
    flat, call = _as_call(tables, rows, grads)
    if update.complete is not None:
        apply_completed(update, tables, row_grads(flat, call, tables))
        return
    run_update(flat, call, _for_tables(update, call), tables)


def apply_completed(update: Update, tables: Sequence[Tensor], found: Sequence[RowGrads]) -> None:
    """Run a rule whose row sums `complete` completes; without tables, only take part.

    Args:
        update: The rule; `tables` and the others follow the order of its tables.
        tables: The tables [R, D]; changed in place.
        found: Per table, distinct rows and their gradients.
    """
    complete = update.complete
    assert complete is not None, "the rows of other rules are whole"
    counts = [rows.numel() for rows, _ in found]
    rule, sums = update.rule, _NO_SUMS.new_empty(0, update.rule.num_sums)
    if not found:
        for _ in range(1 + bool(rule.num_early_sums)):
            complete(sums, counts)
        return
    flat, call = _as_call(tables, *zip(*found, strict=True))
    update = _for_tables(update, call)
    numbers = (update.slots, rule.code, update.settings.as_floats())
    arguments = (flat, *call, list(tables), update.states, update.steps, *numbers)
    sums = complete(_row_sums(*arguments, _NO_SUMS), counts)
    if early := rule.num_early_sums:
        late = complete(_row_sums(*arguments, sums), counts)
        sums = torch.cat([sums[:, :early], late[:, early:]], 1)
    run_update(flat, call, update, tables, sums)


def _for_tables(update: Update, call: Ids) -> Update:
    """Number the tables of a rule as `_as_call` does."""
    return replace(update, tables=tuple(range(len(update.tables))), features=call.features)


def _as_call(
    tables: Sequence[Tensor], rows: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, Ids]:
    """Give gradients of rows as those of a lookup without pooling."""
    counts = [row.numel() for row in rows]
    features = [(t, t, int(Pooling.NONE), table.shape[1]) for t, table in enumerate(tables)]
    call = Ids(
        ids=torch.cat(list(rows)),
        offsets=torch.tensor([0, *counts]).cumsum(0),
        weights=_NO_SUMS,
        is_weighted=False,
        features=torch.tensor(features),
        bags=torch.ones(len(counts), 1, dtype=torch.int64),
        columns=False,
        bad_ids=int(BadIds.RAISE),
    )
    return torch.cat([grad.float().flatten() for grad in grads])[:, None], call
