"""The lookup operators on the GPU: Triton kernels and what launches them.

A program makes a tile of vectors, each the sum of a run of rows; all tables of a call take part in
one launch, through their addresses (one launch per dtype where tables differ in it). Sums run id by
id, without fused multiply-add: the bits are those of the CPU operators.

Bad ids and wrong offsets cannot be refused without waiting for the device. They are noted there,
read nothing and change nothing; a later call on the same tables raises, as soon as the note has
come to the host. Ids, offsets, weights and tables are on the device; features, bags and slots are
on the host; steps, lr and states may be on either.
"""

from functools import lru_cache
from typing import Any, no_type_check
from weakref import WeakSet

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardwise.ops.lookup import gpu_rows, gpu_rules
from shardwise.ops.lookup.gpu_layout import (
    ADDRESS,
    DTYPES,
    FEATURE_FIELDS,
    FIRST_BAG,
    FIRST_ID,
    IS_MEAN,
    IS_NONE,
    LAYER,
    NUM_BAGS,
    NUM_IDS,
    OUT,
    POOLING,
    ROWS,
    TABLE,
    UNSPECIALIZED,
    WIDTH,
    choose_tile,
    find_bag,
    find_group,
    find_items,
    is_aligned,
    lay_out,
    load_float,
    pointers,
    resolve,
)
from shardwise.ops.lookup.reference import RAISE, Ids, Rules
from shardwise.ops.lookup.rules import RULES

IS_RAISE = tl.constexpr(RAISE)
IDS = 1024  # ids that a program counts


# ---- bad ids


class Watch:
    """What the device has noted of a lookup: [is noted, kind, feature, bag, id, table, rows]."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing noted."""
        self.noted = torch.zeros(8, dtype=torch.int64, device=device)
        self.seen = torch.zeros(8, dtype=torch.int64, pin_memory=device.type == "cuda")

    def send(self) -> None:
        """Let the note travel to the host; nobody waits for it."""
        self.seen.copy_(self.noted, non_blocking=True)

    def check(self) -> None:
        """Raise for a note that has arrived, and forget it."""
        if not self.seen[0]:
            return
        if self.noted.is_cuda:
            torch.cuda.synchronize(self.noted.device)
        _, kind, feature, bag, bad_id, table, rows, _ = self.seen.tolist()
        self.noted.zero_()
        self.seen.zero_()
        if kind == 1:
            raise RuntimeError(
                f"shardwise: feature {feature}, bag {bag}: id {bad_id} is outside table {table} "
                f"of {rows} rows; it was in an earlier batch, where it counted as absent"
            )
        raise RuntimeError(
            "shardwise: offsets must start at 0, never decrease and end at the number of ids; "
            "those of an earlier batch did not"
        )


_watches: WeakSet[Watch] = WeakSet()


@lru_cache(maxsize=1024)
def _watch(device: torch.device, lookup: tuple[int, ...]) -> Watch:
    watch = Watch(device)
    _watches.add(watch)
    return watch


def raise_bad_ids() -> None:
    """Wait for the device, and raise for any bad id that no lookup has raised for yet.

    For the end of an epoch, and after the replay of CUDA graphs, which runs no check.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for watch in list(_watches):
        watch.check()


# ---- operators, with the arguments of the schemas


def _read(arguments: tuple[Any, ...]) -> Ids:
    call = Ids(*arguments)
    device = call.ids.device
    weights = call.weights if call.is_weighted else call.ids  # a pointer that nothing reads
    return call._replace(offsets=call.offsets.to(device, non_blocking=True), weights=weights)


def lookup(*arguments: Any) -> Tensor:
    """Look up all features; give [rows, width]."""
    call, (tables, rows, width) = _read(arguments[:8]), arguments[8:]
    out = torch.zeros(rows, width, device=call.ids.device)
    if not (out.numel() and call.features.numel()):
        return out
    known = (*call.features.flatten().tolist(), *(table.data_ptr() for table in tables))
    watch = _watch(call.ids.device, known)
    watch.check()
    tile = choose_tile(tables)
    for code in sorted({DTYPES.index(table.dtype) for table in tables}):
        layout = lay_out(call, tables, out, tile[0], by_id=False, dtype=code)
        _pool[(layout.num_blocks,)](
            *layout.arguments(call),
            out,
            watch.noted,
            call.offsets.numel() - 1,
            width if call.columns else 0,
            out.numel(),
            CODE=code,
            BAD_IDS=call.bad_ids,
            IS_WEIGHTED=call.is_weighted,
            IS_ALIGNED=is_aligned(tables),
            ROW_TILE=tile[0],
            COLUMN_TILE=tile[1],
            GROUPS=layout.padded,
            enable_fp_fusion=False,
        )
    watch.send()
    return out


def count_bad_ids(*arguments: Any) -> Tensor:
    """Count, per feature, the ids that are negative or past their table."""
    call, (tables, rows, width) = _read(arguments[:8]), arguments[8:]
    counts = torch.zeros(call.features.shape[0], dtype=torch.int64, device=call.ids.device)
    if call.ids.numel() and call.features.numel():
        out = torch.empty(rows, width, device="meta")
        layout = lay_out(call, tables, out, IDS, by_id=True)
        _count[(layout.num_blocks,)](
            *layout.arguments(call), counts, TILE=IDS, GROUPS=layout.padded
        )
    return counts


def weight_grads(grad: Tensor, *arguments: Any) -> Tensor:
    """Give the gradient [V] of the per-id weights."""
    call, tables = _read(arguments[:8]), arguments[8]
    result = torch.zeros(call.ids.numel(), device=grad.device)
    if not (result.numel() and call.features.numel()):
        return result
    tile = choose_tile(tables)
    for code in sorted({DTYPES.index(table.dtype) for table in tables}):
        layout = lay_out(call, tables, grad, tile[0], by_id=True, dtype=code)
        # Features that read one input add to the same numbers, so they run one after the other.
        for layer in range(layout.num_layers):
            _dot[(layout.num_blocks,)](
                *layout.arguments(call),
                grad,
                result,
                grad.shape[1] if call.columns else 0,
                layer,
                CODE=code,
                BAD_IDS=call.bad_ids,
                IS_ALIGNED=is_aligned(tables),
                ROW_TILE=tile[0],
                COLUMN_TILE=tile[1],
                GROUPS=layout.padded,
                enable_fp_fusion=False,
            )
    return result


def row_grads(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Give the touched rows [N], their gradients flat, and how many rows each table has.

    Waits for the device: the sizes of the results are known only there.
    """
    call, tables = _read(arguments[:8]), arguments[8]
    runs = gpu_rows.group_rows(grad, call, tables)
    rows, counts = runs.rows()
    widths = [table.shape[1] for table in tables]
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    flat = torch.empty(sum(sizes), device=grad.device)
    # Row r of all, of table t, begins at bases[t] + r * widths[t].
    bases, row, place = [], 0, 0
    for count, width, size in zip(counts, widths, sizes, strict=True):
        bases.append(place - row * width)
        row, place = row + count, place + size
    gpu_rules.write_grads(runs, bases, flat)
    return rows, flat, torch.tensor(counts, dtype=torch.int64)


def row_sums(grad: Tensor, *arguments: Any) -> Tensor:
    """Give the rule's row sums [N, num_sums] of the touched rows, table after table.

    Waits for the device, as `row_grads`.
    """
    call, rules, given = _read(arguments[:8]), Rules(*arguments[8:14]), arguments[14]
    runs = gpu_rows.group_rows(grad, call, rules.tables)
    rows, _ = runs.rows()
    out = torch.empty(rows.numel(), RULES[rules.code].num_sums, device=grad.device)
    if out.numel():
        gpu_rules.run_rule(runs, rules, lr=grad.new_zeros(()), given=given, sums=out)
    return out


def update_(grad: Tensor, *arguments: Any) -> None:
    """Update every touched row once, in place; given sums replace the rule's own."""
    call, rules, (seed, lr, given) = _read(arguments[:8]), Rules(*arguments[8:14]), arguments[14:]
    runs = gpu_rows.group_rows(grad, call, rules.tables)
    gpu_rules.run_rule(runs, rules, lr=lr, given=given, seed=seed)
    rules.steps.add_(1)


# ---- kernels


@triton.jit
@no_type_check
def _note(noted, kind, feature, bag, bad_id, table, num_rows):
    """Write a note unless there is one; of several faults, any one is noted."""
    before = tl.atomic_cas(noted, tl.full((), 0, tl.int64), tl.full((), 1, tl.int64))
    if before == 0:
        tl.store(noted + 1, kind)
        tl.store(noted + 2, feature)
        tl.store(noted + 3, bag)
        tl.store(noted + 4, bad_id)
        tl.store(noted + 5, table)
        tl.store(noted + 6, num_rows)


@triton.jit
@no_type_check
def _add_rows(
    total, worst, place, end, ids, weights, address, num_rows, width, columns,
    CODE: tl.constexpr, BAD_IDS: tl.constexpr, IS_WEIGHTED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the row of one id to each vector of the tile, and note the first place of a bad id."""
    is_there = place < end
    one = tl.load(ids + place, mask=is_there, other=0).to(tl.int64)
    row, is_good = resolve(one, num_rows, BAD_IDS)
    if BAD_IDS == IS_RAISE:
        worst = tl.where(is_there & ~is_good & (worst < 0), place, worst)
    is_there = is_there & is_good
    start = pointers(address, row * width, CODE, IS_ALIGNED)
    mask = is_there[:, None] & (columns < width)[None, :]
    values = load_float(start[:, None] + columns[None, :], mask, CODE)
    if IS_WEIGHTED:
        values *= tl.load(weights + place, mask=is_there, other=0.0)[:, None]
    return total + values, worst


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _pool(
    features, groups, ids, offsets, weights, num_ids, num_features, search_steps,
    out, noted, num_bags, out_width, out_size,
    CODE: tl.constexpr, BAD_IDS: tl.constexpr, IS_WEIGHTED: tl.constexpr,
    IS_ALIGNED: tl.constexpr, ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
    GROUPS: tl.constexpr, UNROLL: tl.constexpr = 4,
):  # fmt: skip
    program = tl.program_id(0)
    is_wrong = (tl.load(offsets) != 0) | (tl.load(offsets + num_bags) != num_ids)
    if (program == 0) & is_wrong:
        _note(noted, 2, 0, 0, 0, 0, 0)
    g, block = find_group(groups, program, GROUPS)
    if g == GROUPS:
        return
    feature = features + (g % num_features) * FEATURE_FIELDS
    width = tl.load(feature + WIDTH)
    if IS_ALIGNED:
        width = tl.multiple_of(width, 4)
    num_rows = tl.load(feature + ROWS)
    pooling = tl.load(feature + POOLING)
    first_bag = tl.load(groups + FIRST_BAG * GROUPS + g)
    bag_count = tl.load(groups + NUM_BAGS * GROUPS + g)
    first_id = tl.load(groups + FIRST_ID * GROUPS + g)
    vector = block * ROW_TILE + tl.arange(0, ROW_TILE)
    if pooling == IS_NONE:
        count = tl.load(groups + NUM_IDS * GROUPS + g)
        begin = first_id + vector
        end = tl.where(vector < count, begin + 1, begin)
    else:
        count = bag_count
        bag = offsets + first_bag + vector
        begin = tl.load(bag, mask=vector < count, other=0).to(tl.int64)
        end = tl.load(bag + 1, mask=vector < count, other=0).to(tl.int64)
        if tl.max(((begin < 0) | (end < begin) | (end > num_ids)).to(tl.int32), 0) > 0:
            _note(noted, 2, 0, 0, 0, 0, 0)
            begin = tl.maximum(begin, 0)
            end = tl.minimum(end, num_ids)
    address = tl.load(feature + ADDRESS)
    columns = tl.arange(0, COLUMN_TILE)
    total = tl.zeros((ROW_TILE, COLUMN_TILE), tl.float32)
    worst = tl.full((ROW_TILE,), -1, tl.int64)
    total, worst = _add_rows(
        total, worst, begin, end, ids, weights, address, num_rows, width, columns,
        CODE, BAD_IDS, IS_WEIGHTED, IS_ALIGNED,
    )  # fmt: skip
    for i in range(1, tl.max(end - begin, 0), UNROLL):
        for j in tl.static_range(UNROLL):
            total, worst = _add_rows(
                total, worst, begin + (i + j), end, ids, weights, address, num_rows, width,
                columns, CODE, BAD_IDS, IS_WEIGHTED, IS_ALIGNED,
            )  # fmt: skip
    if pooling == IS_MEAN:
        total = tl.div_rn(total, tl.maximum(end - begin, 1).to(tl.float32)[:, None])
    if BAD_IDS == IS_RAISE:
        place = tl.max(worst, 0)
        if place >= 0:
            bag = find_bag(offsets, place, first_bag, bag_count, search_steps) - first_bag
            bad_id = tl.load(ids + place).to(tl.int64)
            _note(noted, 1, g % num_features, bag, bad_id, tl.load(feature + TABLE), num_rows)
    stride = tl.where(out_width > 0, out_width, width)
    start = tl.load(groups + OUT * GROUPS + g) + vector * stride
    mask = ((vector < count) & (start + width <= out_size))[:, None] & (columns < width)[None, :]
    if IS_ALIGNED:
        start = tl.multiple_of(start, (4,))
    tl.store(out + start[:, None] + columns[None, :], total, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _count(
    features, groups, ids, offsets, weights, num_ids, num_features, search_steps,
    counts, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    g, block = find_group(groups, tl.program_id(0), GROUPS)
    if g == GROUPS:
        return
    f = g % num_features
    i = block * TILE + tl.arange(0, TILE)
    is_there = i < tl.load(groups + NUM_IDS * GROUPS + g)
    place = tl.load(groups + FIRST_ID * GROUPS + g) + i
    one = tl.load(ids + place, mask=is_there, other=0).to(tl.int64)
    is_bad = is_there & ((one < 0) | (one >= tl.load(features + f * FEATURE_FIELDS + ROWS)))
    tl.atomic_add(counts + f, tl.sum(is_bad.to(tl.int64), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _dot(
    features, groups, ids, offsets, weights, num_ids, num_features, search_steps,
    grad, result, out_width, layer,
    CODE: tl.constexpr, BAD_IDS: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    g, block = find_group(groups, tl.program_id(0), GROUPS)
    if g == GROUPS:
        return
    feature = features + (g % num_features) * FEATURE_FIELDS
    if tl.load(feature + LAYER) != layer:
        return
    i = block * ROW_TILE + tl.arange(0, ROW_TILE)
    is_there, place, row, start, divisor = find_items(
        i, g, feature, groups, ids, offsets, search_steps, out_width, BAD_IDS, GROUPS
    )
    width = tl.load(feature + WIDTH)
    if IS_ALIGNED:
        width = tl.multiple_of(width, 4)
    columns = tl.arange(0, COLUMN_TILE)
    mask = is_there[:, None] & (columns < width)[None, :]
    rows = pointers(tl.load(feature + ADDRESS), row * width, CODE, IS_ALIGNED)
    values = load_float(rows[:, None] + columns[None, :], mask, CODE)
    grads = pointers(grad.to(tl.int64), start, 0, IS_ALIGNED)[:, None] + columns[None, :]
    grads = tl.load(grads, mask=mask, other=0.0)
    dots = tl.div_rn(tl.sum(values * grads, 1), divisor)
    before = tl.load(result + place, mask=is_there, other=0.0)
    tl.store(result + place, before + dots, mask=is_there)
