"""The definition of the lookup operators, in plain PyTorch.

Layout of the ids: [source][input][bag]. `bags[k, s]` counts the bags of input k that came from
source s; one `offsets` runs over all of them. A *feature* is a row of `features`: (input, table,
pooling, width); several features may read one input. A table of -1 leaves a feature out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.lookup.rounding import random_bits, round_stochastically
from shardwise.ops.lookup.rules import RULES, Rows, Settings, prepare_gradient, updated_weight

SUM, MEAN, NONE = 0, 1, 2
RAISE, CLIP, HASH, IGNORE = 0, 1, 2, 3


class Ids(NamedTuple):
    """What is looked up: the arguments that all operators share, in their order."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor
    is_weighted: bool
    features: Tensor
    bags: Tensor
    columns: bool
    bad_ids: int


class Group(NamedTuple):
    """One feature of one source."""

    feature: int
    table: int
    pooling: int
    width: int
    bag: int  # first of its bags
    num_bags: int
    start: int  # first of its ids
    stop: int
    out: int  # where its block starts in the output, in elements
    stride: int  # between two rows of its block

    @property
    def num_rows(self) -> int:
        """Rows of its block in the output."""
        return self.stop - self.start if self.pooling == NONE else self.num_bags


def bag_counts(features: Tensor, bags: Tensor, offsets: Tensor) -> Tensor:
    """Give `bags`, or the equal share of each input where it is empty: one source."""
    if bags.numel():
        return bags
    inputs = int(features[:, 0].max()) + 1 if features.numel() else 1
    count, rest = divmod(offsets.numel() - 1, inputs)
    if rest:
        raise ValueError(f"{offsets.numel() - 1} bags cannot be shared by {inputs} inputs equally")
    return torch.full((inputs, 1), count)


def groups(call: Ids, out_width: int) -> Iterator[Group]:
    """Lay out the groups of a call in the order [source][feature]."""
    bags = bag_counts(call.features, call.bags, call.offsets).tolist()
    first, out = 0, 0
    for source in range(len(bags[0]) if bags else 0):
        starts = [first]
        for counts in bags:
            starts.append(starts[-1] + counts[source])
        first = starts[-1]
        for feature, (key, table, pooling, width) in enumerate(call.features.tolist()):
            bag, last = starts[key], starts[key + 1]
            start, stop = int(call.offsets[bag]), int(call.offsets[last])
            stride = out_width if call.columns else width
            group = Group(feature, table, pooling, width, bag, last - bag, start, stop, out, stride)
            yield group
            out += width if call.columns else group.num_rows * width


def resolve(call: Ids, group: Group, num_rows: int) -> tuple[Tensor, Tensor]:
    """Apply the policy for bad ids: rows to read, and which ids count at all."""
    ids = call.ids[group.start : group.stop].long()
    is_good = (ids >= 0) & (ids < num_rows)
    if call.bad_ids == RAISE and not bool(is_good.all()):
        place = int((~is_good).nonzero()[0])
        bag = int(torch.searchsorted(call.offsets, group.start + place, right=True)) - 1
        raise RuntimeError(
            f"shardwise: feature {group.feature}, bag {bag - group.bag}: id {ids[place].item()} "
            f"is outside table {group.table} of {num_rows} rows"
        )
    if call.bad_ids == HASH:
        return ids.remainder(num_rows), torch.ones_like(is_good)
    if call.bad_ids == CLIP:
        return ids.clamp(0, num_rows - 1), torch.ones_like(is_good)
    return ids[is_good], is_good


def bag_of_ids(call: Ids, group: Group) -> tuple[Tensor, Tensor]:
    """Give each id's row in the group's output block [n], and the bags' lengths."""
    bounds = call.offsets[group.bag : group.bag + group.num_bags + 1].long()
    lengths = bounds.diff()
    if group.pooling == NONE:
        return torch.arange(group.stop - group.start, device=lengths.device), lengths
    bag = torch.arange(group.num_bags, device=lengths.device)
    return torch.repeat_interleave(bag, lengths, output_size=group.stop - group.start), lengths


def coefficients(call: Ids, group: Group, is_good: Tensor, with_weights: bool = True) -> Tensor:
    """Give what each row is multiplied by before it is added: its weight over a mean's count."""
    bag, lengths = bag_of_ids(call, group)
    scale = torch.ones(bag.numel(), device=bag.device)
    if call.is_weighted and with_weights:
        scale = call.weights[group.start : group.stop].float()
    if group.pooling == MEAN:
        scale = scale / lengths.clamp(min=1)[bag]
    return scale[is_good]


def check_offsets(call: Ids) -> None:
    """Refuse offsets that do not partition the ids."""
    if call.offsets.numel() == 0 or call.offsets[0] != 0 or bool((call.offsets.diff() < 0).any()):
        raise RuntimeError("shardwise: offsets must start at 0 and never decrease")
    if call.offsets[-1] != call.ids.numel():
        raise RuntimeError(
            f"shardwise: lengths sum to {call.offsets[-1].item()}, but there are "
            f"{call.ids.numel()} ids"
        )
    if call.is_weighted and call.weights.numel() != call.ids.numel():
        raise RuntimeError(f"shardwise: {call.weights.numel()} weights for {call.ids.numel()} ids")


def block(buffer: Tensor, group: Group) -> Tensor:
    """View the group's block [rows, width] of the flat output or gradient."""
    return buffer.as_strided((group.num_rows, group.width), (group.stride, 1), group.out)


def lookup(call: Ids, tables: list[Tensor], rows: int, width: int) -> Tensor:
    """Look up all features; give [rows, width]."""
    check_offsets(call)
    out = torch.zeros(rows, width, device=call.ids.device)
    for group in groups(call, width):
        table = tables[group.table]
        found, is_good = resolve(call, group, table.shape[0])
        values = table[found].float() * coefficients(call, group, is_good)[:, None]
        bag, _ = bag_of_ids(call, group)
        block(out, group).index_add_(0, bag[is_good], values)
    return out


def count_bad_ids(call: Ids, tables: list[Tensor], rows: int, width: int) -> Tensor:
    """Count, per feature, the ids that are negative or past their table."""
    counts = torch.zeros(call.features.shape[0], dtype=torch.int64, device=call.ids.device)
    for group in groups(call, width):
        ids = call.ids[group.start : group.stop]
        counts[group.feature] += ((ids < 0) | (ids >= tables[group.table].shape[0])).sum()
    return counts


class Touched(NamedTuple):
    """The distinct rows of one table that a call reads, ascending, and their gradients."""

    table: int
    rows: Tensor  # [N]
    grad: Tensor  # [N, D], float32


def touched_rows(grad: Tensor, call: Ids, tables: list[Tensor]) -> list[Touched]:
    """Sum the gradients of each row, in the order [feature][source][bag]; one entry per table."""
    check_offsets(call)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tables]
    in_order = sorted(groups(call, grad.shape[1]), key=lambda group: group.feature)
    flat = grad.float().contiguous()
    for group in in_order:
        if group.table < 0:
            continue
        rows, is_good = resolve(call, group, tables[group.table].shape[0])
        bag, _ = bag_of_ids(call, group)
        scale = coefficients(call, group, is_good)[:, None]
        found[group.table].append((rows, block(flat, group)[bag[is_good]] * scale))
    pairs = zip(tables, found, strict=True)
    return [_coalesce(index, table, pieces) for index, (table, pieces) in enumerate(pairs)]


def _coalesce(index: int, table: Tensor, pieces: list[tuple[Tensor, Tensor]]) -> Touched:
    empty = torch.zeros(0, table.shape[1], device=table.device)
    rows = torch.cat([rows for rows, _ in pieces] + [empty[:, 0].long()])
    grads = torch.cat([grads for _, grads in pieces] + [empty])
    distinct, position = rows.unique(return_inverse=True)
    summed = torch.zeros(distinct.numel(), table.shape[1], device=table.device)
    return Touched(index, distinct, summed.index_add_(0, position, grads))


def row_grads(grad: Tensor, call: Ids, tables: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Give the touched rows [N], their gradients flat, and how many rows each table has."""
    touched = touched_rows(grad, call, tables)
    counts = torch.tensor([entry.rows.numel() for entry in touched], dtype=torch.int64)
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *(entry.rows for entry in touched)])
    return rows, torch.cat([torch.empty(0), *(entry.grad.flatten() for entry in touched)]), counts


def weight_grads(grad: Tensor, call: Ids, tables: list[Tensor]) -> Tensor:
    """Give the gradient [V] of the per-id weights."""
    check_offsets(call)
    result = torch.zeros(call.ids.numel(), device=grad.device)
    flat = grad.float().contiguous()
    for group in groups(call, grad.shape[1]):
        if group.table < 0:
            continue
        own = slice(group.start, group.stop)
        table = tables[group.table]
        rows, is_good = resolve(call, group, table.shape[0])
        bag, _ = bag_of_ids(call, group)
        product = (table[rows].float() * block(flat, group)[bag[is_good]]).sum(1)
        result[own][is_good] += product * coefficients(call, group, is_good, with_weights=False)
    return result


class Rules(NamedTuple):
    """What `row_sums` and `update_` need beside the gradients, in the operators' order."""

    tables: list[Tensor]
    states: list[Tensor]
    steps: Tensor
    slots: Tensor
    code: int
    floats: list[float]

    def rows(self, touched: Touched, step: int) -> Rows:
        """Gather what the rule sees of the touched rows of one table."""
        rule, settings = RULES[self.code], Settings.from_floats(self.floats)
        first = touched.table * len(rule.states)
        weight = self.tables[touched.table][touched.rows].float()
        grad = prepare_gradient(touched.grad, weight, settings)
        own = [state[touched.rows] for state in self.states[first : first + len(rule.states)]]
        return Rows(weight, grad, own, step, int(self.slots[touched.table, 3]), settings)


def row_sums(grad: Tensor, call: Ids, rules: Rules, given: Tensor) -> Tensor:
    """Give the rule's row sums [N, num_sums] of the touched rows, table after table.

    Sums that are `given`, when not empty, are the first ones of whole rows; those that are made of
    them are made anew, the others stay.
    """
    rule = RULES[rules.code]
    sums, start = [torch.empty(0, rule.num_sums, device=grad.device)], 0
    for touched in touched_rows(grad, call, rules.tables):
        rows = rules.rows(touched, int(rules.steps[touched.table]) + 1)
        stop = start + touched.rows.numel()
        sums.append(rule.row_sums(rows, given[start:stop] if given.numel() else None))
        start = stop
    return torch.cat(sums)


def update_(grad: Tensor, call: Ids, rules: Rules, seed: int, lr: Tensor, sums: Tensor) -> None:
    """Update every touched row once, in place; `sums` replaces the rule's own when not empty."""
    rule = RULES[rules.code]
    every = touched_rows(grad, call, rules.tables)
    rules.steps.add_(1)
    start = 0
    for touched in every:
        rows = rules.rows(touched, int(rules.steps[touched.table]))
        stop = start + touched.rows.numel()
        own = sums[start:stop] if sums.numel() else rule.row_sums(rows, None)
        new = updated_weight(rule, rows, own, lr)
        first = touched.table * len(rule.states)
        for state, values in zip(rules.states[first:], rows.states, strict=False):
            state[touched.rows] = values
        _write(rules, touched, rows.step, new, seed)
        start = stop


def _write(rules: Rules, touched: Touched, step: int, new: Tensor, seed: int) -> None:
    table = rules.tables[touched.table]
    key, first_row, first_column, _ = rules.slots[touched.table].tolist()
    if seed >= 0 and table.dtype != torch.float32:
        columns = torch.arange(table.shape[1], device=table.device) + first_column
        bits = random_bits(seed, step, key, touched.rows + first_row, columns)
        new = round_stochastically(new, table.dtype, bits)
    table[touched.rows] = new.to(table.dtype)
