"""Look up rows of many tables in one call, and bring gradients back to them.

One operator family serves pooled and per-id lookups, weighted or not, of tables of any width, for
ids of one source or of many (see `reference`, the definition). Backward is exact: the gradients of
a row are summed first and the row is updated once per call, in one of three ways per table:

* an `Update` in backward: the rule runs inside backward and no gradient is stored;
* `sparse`: the gradient is a coalesced row-sparse tensor, for `optim.TableOptimizer` at its step;
* dense: a gradient of the table's size, for any PyTorch optimizer.

Two calls that read one table before one backward update it twice, one after the other.
"""

from collections.abc import Sequence
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

__all__ = [
    "RULES",
    "BadIds",
    "Ids",
    "Pooling",
    "Rule",
    "Settings",
    "Update",
    "Way",
    "advise_huge_pages",
    "apply_update",
    "count_bad_ids",
    "lookup",
    "plan_backward",
    "restrict",
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


def _run_update(grad: Tensor, call: Ids, update: Update, tables: Sequence[Tensor]) -> None:
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
        _NO_SUMS,
    )
    if not torch.compiler.is_compiling():  # traced code is given the version by the compiler
        torch.autograd.graph.increment_version(own)


def _dense_grads(grad: Tensor, call: Ids, way: Way, tables: Sequence[Tensor]) -> list[Tensor]:
    """Sum gradients into zeros: SGD with a learning rate of -1."""
    result = [torch.zeros_like(tables[t]) for t in way.dense]
    count = len(result)
    steps = torch.zeros(count, dtype=torch.int64)
    slots = torch.zeros(count, 4, dtype=torch.int64)
    call = call._replace(features=way.dense_features)
    _update(grad, *call, result, [], steps, slots, *_PLAIN_SUM)
    return result


def _sparse_grads(grad: Tensor, call: Ids, way: Way, tables: Sequence[Tensor]) -> list[Tensor]:
    own = [tables[t] for t in way.sparse]
    rows, flat, counts = _row_grads(grad, *call._replace(features=way.sparse_features), own)
    result, first, start = [], 0, 0
    for table, count in zip(own, counts.tolist(), strict=True):
        size = count * table.shape[1]
        values = flat[start : start + size].view(count, table.shape[1]).to(table.dtype)
        index = rows[None, first : first + count]
        result.append(
            torch.sparse_coo_tensor(
                index, values, table.shape, is_coalesced=True, check_invariants=False
            )
        )
        first, start = first + count, start + size
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
            weight_grad = _weight_grads(grad, *call, list(tables)).to(call.weights.dtype)
        by_table: dict[int, Tensor] = {}
        if way.dense:
            by_table |= zip(way.dense, _dense_grads(grad, call, way, tables), strict=True)
        if way.sparse:
            by_table |= zip(way.sparse, _sparse_grads(grad, call, way, tables), strict=True)
        for update in way.updates:
            _run_update(grad, call, update, tables)
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
    counts = [row.numel() for row in rows]
    bounds = torch.tensor([0, *counts]).cumsum(0)
    widths = [table.shape[1] for table in tables]
    features = [(t, t, int(Pooling.NONE), width) for t, width in enumerate(widths)]
    call = Ids(
        ids=torch.cat(list(rows)),
        offsets=bounds,
        weights=_NO_SUMS,
        is_weighted=False,
        features=torch.tensor(features),
        bags=torch.ones(len(counts), 1, dtype=torch.int64),
        columns=False,
        bad_ids=int(BadIds.RAISE),
    )
    flat = torch.cat([grad.float().flatten() for grad in grads])[:, None]
    own = replace(update, tables=tuple(range(len(tables))), features=call.features)
    _run_update(flat, call, own, tables)
