"""Where a call's ids lie and where their vectors go, worked out on the GPU.

A call is cut into groups (a feature of a source, as in `reference`) and these into blocks, one per
program. How many ids a group has stands in the offsets, on the device: one small kernel lays the
groups out, grids are upper bounds whose last programs find nothing to do, and the host never
waits. Numbers that stay alike from call to call (addresses, features) are sent once and kept.

Functions under `triton.jit` are read by Triton, not run by Python.
"""

from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardwise.ops.lookup.reference import CLIP, HASH, MEAN, NONE, Ids, bag_counts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of rows; the position is their code in the kernels."""

# Numbers kept of a feature, and those worked out of a group.
INPUT, TABLE, POOLING, WIDTH, ROWS, ADDRESS, DTYPE, LAYER = map(tl.constexpr, range(8))
FIRST_BAG, NUM_BAGS, FIRST_ID, NUM_IDS, OUT, FIRST_ITEM, BLOCK_END = map(tl.constexpr, range(7))
FEATURE_FIELDS, GROUP_FIELDS = tl.constexpr(8), tl.constexpr(7)
IS_CLIP, IS_HASH, IS_MEAN, IS_NONE = map(tl.constexpr, (CLIP, HASH, MEAN, NONE))

UNSPECIALIZED = [
    *("num_ids", "num_features", "num_groups", "num_bags", "equal_bags", "search_steps"),
    *("out_width", "out_size", "dtype", "layer", "num_items", "row_bits", "no_row"),
]
"""Arguments that change from call to call: no kernel is compiled for particular values of them."""

TILE = 2048  # elements that a program holds at a time


@lru_cache(maxsize=1024)
def on_device(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Give numbers as an int64 tensor, kept for the next call that needs the same ones.

    The copy is complete on return, so that any stream may read it. The first call of its kind
    waits for it, and cannot be captured in a CUDA graph.
    """
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def is_aligned(tables: list[Tensor]) -> bool:
    """Tell whether every row begins at a multiple of 16 bytes and of 4 elements."""
    return all(
        table.data_ptr() % 16 == 0
        and table.shape[1] * table.element_size() % 16 == 0
        and table.shape[1] % 4 == 0
        for table in tables
    )


def choose_tile(tables: list[Tensor]) -> tuple[int, int]:
    """Choose how many vectors a program holds, and how many columns: enough for every table."""
    columns = triton.next_power_of_2(max(table.shape[1] for table in tables))
    return max(1, TILE // columns), columns


class Layout(NamedTuple):
    """A call, ready for kernels.

    Attributes:
        features: Per feature the fields above.
        groups: [GROUP_FIELDS, GROUPS], filled on the device.
        num_features: Features of the call.
        num_groups: Features times sources.
        num_blocks: At least as many as there are.
        num_layers: The most features that read one input; feature by feature of an input, each
            is in the next layer.
        num_items: At least as many (feature, id) pairs as there are.
        search_steps: Halvings that find one of all bags.
    """

    features: Tensor
    groups: Tensor
    num_features: int
    num_groups: int
    num_blocks: int
    num_layers: int
    num_items: int
    search_steps: int

    @property
    def padded(self) -> int:
        """Groups as the kernels see them: a power of two."""
        return int(self.groups.shape[1])

    def arguments(self, call: Ids) -> tuple[Tensor | int, ...]:
        """Give the arguments with which every kernel on a call begins."""
        return (
            *(self.features, self.groups, call.ids, call.offsets, call.weights),
            *(call.ids.numel(), self.num_features, self.search_steps),
        )


def lay_out(
    call: Ids,
    tables: list[Tensor],
    out: Tensor,
    block: int,
    *,
    by_id: bool,
    dtype: int = -1,
) -> Layout:
    """Lay out a call whose tensors are on one device, `features` and `bags` apart.

    Args:
        call: Ids and their layout.
        tables: The tables.
        out: The result or its gradient; only its shape matters.
        block: Ids or rows of the result per block.
        by_id: Cut groups into blocks of ids, not of rows of the result.
        dtype: Leave out the groups of tables of another dtype; -1 takes all.

    Raises:
        RuntimeError: What the host knows of the call contradicts itself.
    """
    features: list[list[int]] = call.features.tolist()
    bags = bag_counts(call.features, call.bags, call.offsets)
    _check(call, features, bags, tables, out)
    reads = [0] * bags.shape[0]
    numbers: list[int] = []
    for key, table, pooling, width in features:
        own = tables[table] if table >= 0 else None
        about = (own.shape[0], own.data_ptr(), DTYPES.index(own.dtype)) if own is not None else ()
        numbers += [key, table, pooling, width, *(about or (0, 0, -1)), reads[key]]
        reads[key] += table >= 0
    device, num_groups = call.ids.device, len(features) * bags.shape[1]
    layers = max(reads, default=0)
    num_items = call.ids.numel() * layers
    num_rows = sum(int(bags[k].sum()) for k, _, pooling, _ in features if pooling != NONE)
    num_rows += call.ids.numel() * layers * any(pooling == NONE for _, _, pooling, _ in features)
    groups = call.offsets.new_empty(
        GROUP_FIELDS.value, triton.next_power_of_2(num_groups), dtype=torch.int64
    )
    layout = Layout(
        features=on_device(device, tuple(numbers)),
        groups=groups,
        num_features=len(features),
        num_groups=num_groups,
        num_blocks=(num_items if by_id else num_rows) // block + num_groups,
        num_layers=layers,
        num_items=num_items,
        search_steps=call.offsets.numel().bit_length(),
    )
    equal = int(bags[0, 0]) if bags.shape[1] == 1 and bool((bags == bags[0]).all()) else -1
    spans = groups if equal >= 0 else _spans(features, bags).to(device, non_blocking=True)
    _lay_out[(1,)](
        layout.features,
        spans,
        call.offsets,
        groups,
        call.ids.numel(),
        layout.num_features,
        num_groups,
        equal,
        dtype,
        BLOCK=block,
        BY_ID=by_id,
        IS_COLUMNS=call.columns,
        GROUPS=layout.padded,
    )
    return layout


def _spans(features: list[list[int]], bags: Tensor) -> Tensor:
    """Give the first bag and the number of bags [2, groups], group by group."""
    counts = bags.t().reshape(-1)
    starts = (counts.cumsum(0) - counts).view(bags.shape[1], -1)
    inputs = [key for key, *_ in features]
    return torch.stack([starts[:, inputs], bags.t()[:, inputs]]).view(2, -1)


def _check(
    call: Ids, features: list[list[int]], bags: Tensor, tables: list[Tensor], out: Tensor
) -> None:
    """Refuse what the host can see to be wrong; the device checks offsets and ids."""
    _check_tensors(call, tables)
    num_bags = call.offsets.numel() - 1
    if int(bags.sum()) != num_bags:
        raise RuntimeError(f"shardwise: bags name {int(bags.sum())} of {num_bags} bags")
    for index, (key, table, _, width) in enumerate(features):
        if not 0 <= key < bags.shape[0]:
            raise RuntimeError(f"shardwise: feature {index} reads input {key}, which is not there")
        if table >= len(tables) or (table >= 0 and tables[table].shape[1] != width):
            raise RuntimeError(
                f"shardwise: feature {index} of width {width} does not fit its table"
            )
    if call.columns and (bags.shape[1] != 1 or sum(f[3] for f in features) != out.shape[1]):
        raise RuntimeError("shardwise: the features do not fill the output")


def _check_tensors(call: Ids, tables: list[Tensor]) -> None:
    device, num_ids = call.ids.device, call.ids.numel()
    if call.ids.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"shardwise: ids must be int32 or int64, got {call.ids.dtype}")
    if call.is_weighted and (call.weights.numel(), call.weights.dtype) != (num_ids, torch.float32):
        raise RuntimeError(
            f"shardwise: {call.weights.numel()} weights for {num_ids} ids, {call.weights.dtype}; "
            f"there must be one float32 each"
        )
    rows = [table for table in tables if table.numel()]  # to count rows, any device will do
    for tensor in (call.ids, call.offsets, call.weights, *rows):
        if tensor.device != device or not tensor.is_contiguous():
            raise RuntimeError(f"shardwise: all tensors must be contiguous and on {device}")
    for index, table in enumerate(tables):
        if table.dtype not in DTYPES:
            raise RuntimeError(
                f"shardwise: table {index} must be float32, float16 or bfloat16, got {table.dtype}"
            )


@triton.jit
@no_type_check
def _bounds(g, features, spans, offsets, num_ids, num_features, num_groups, equal_bags):
    """Give the feature, the bags and the ids of groups; nothing of those that are not there."""
    live = g < num_groups
    feature = features + (g % num_features) * FEATURE_FIELDS
    if equal_bags >= 0:
        first_bag = tl.load(feature + INPUT) * equal_bags
        num_bags = equal_bags + first_bag * 0
    else:
        first_bag = tl.load(spans + g, mask=live, other=0)
        num_bags = tl.load(spans + num_groups + g, mask=live, other=0)
    first_id = tl.load(offsets + first_bag, mask=live, other=0).to(tl.int64)
    last_id = tl.load(offsets + first_bag + num_bags, mask=live, other=0).to(tl.int64)
    # Clamped, so that wrong offsets lead to no wrong address.
    first_id = tl.minimum(tl.maximum(first_id, 0), num_ids)
    num_read = tl.maximum(tl.minimum(last_id, num_ids) - first_id, 0)
    return feature, live, first_bag, num_bags, first_id, num_read


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _lay_out(
    features, spans, offsets, groups, num_ids, num_features, num_groups, equal_bags, dtype,
    BLOCK: tl.constexpr, BY_ID: tl.constexpr, IS_COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, GROUPS)
    feature, live, first_bag, num_bags, first_id, count = _bounds(
        g, features, spans, offsets, num_ids, num_features, num_groups, equal_bags
    )
    width = tl.load(feature + WIDTH)
    num_rows = tl.where(tl.load(feature + POOLING) == IS_NONE, count, num_bags)
    size = tl.where(live, width if IS_COLUMNS else num_rows * width, 0)
    is_read = live & (tl.load(feature + TABLE) >= 0)
    if dtype >= 0:
        is_read = is_read & (tl.load(feature + DTYPE) == dtype)
    num_blocks = tl.where(is_read, ((count if BY_ID else num_rows) + BLOCK - 1) // BLOCK, 0)
    tl.store(groups + FIRST_BAG * GROUPS + g, first_bag)
    tl.store(groups + NUM_BAGS * GROUPS + g, num_bags)
    tl.store(groups + FIRST_ID * GROUPS + g, first_id)
    tl.store(groups + NUM_IDS * GROUPS + g, count)
    tl.store(groups + OUT * GROUPS + g, tl.cumsum(size, 0) - size)
    tl.store(groups + BLOCK_END * GROUPS + g, tl.cumsum(num_blocks, 0))
    # Items, the pairs of a feature and an id, are in the order [feature][source].
    num_sources = num_groups // num_features
    g = tl.where(live, (g % num_sources) * num_features + g // num_sources, g)
    feature, live, first_bag, num_bags, first_id, count = _bounds(
        g, features, spans, offsets, num_ids, num_features, num_groups, equal_bags
    )
    count = tl.where(live & (tl.load(feature + TABLE, mask=live, other=-1) >= 0), count, 0)
    tl.store(groups + FIRST_ITEM * GROUPS + g, tl.cumsum(count, 0) - count, mask=live)


@triton.jit
@no_type_check
def find_group(groups, program, GROUPS: tl.constexpr):
    """Give the group that a program works on, and which of its blocks.

    Past the last block the group is GROUPS.
    """
    ends = tl.load(groups + BLOCK_END * GROUPS + tl.arange(0, GROUPS))
    is_before = ends <= program
    group = tl.sum(is_before.to(tl.int32), 0)
    return group, program - tl.max(tl.where(is_before, ends, 0), 0)


@triton.jit
@no_type_check
def find_bag(offsets, place, first_bag, num_bags, search_steps):
    """Give the bag, among `num_bags` ones, that holds the id at each place."""
    low = place * 0 + first_bag
    high = low + num_bags
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_right = tl.load(offsets + middle) <= place
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    return low


@triton.jit
@no_type_check
def resolve(ids, num_rows, BAD_IDS: tl.constexpr):
    """Give the rows that ids read under the policy, and whether there is one."""
    is_good = (ids >= 0) & (ids < num_rows)
    row = ids
    if BAD_IDS == IS_CLIP:
        row = tl.minimum(tl.maximum(ids, 0), num_rows - 1)
        is_good = row >= 0
    elif BAD_IDS == IS_HASH:
        row = ids % tl.maximum(num_rows, 1)
        row = tl.where(row < 0, row + num_rows, row)
        is_good = row < num_rows
    return row, is_good


@triton.jit
@no_type_check
def pointers(address, place, CODE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Point at elements [N] of the tables at `address`; bfloat16 is read and written as bits."""
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32)) + place
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.float16)) + place
    else:
        pointer = address.to(tl.pointer_type(tl.uint16)) + place
    if IS_ALIGNED:  # tells the compiler that wide loads will do, as all such hints here
        pointer = tl.multiple_of(pointer, (16,))
    return pointer


@triton.jit
@no_type_check
def load_float(pointer, mask, CODE: tl.constexpr):
    """Load elements as float32, 0 where masked."""
    loaded = tl.load(pointer, mask=mask, other=0)
    if CODE == 2:
        loaded = (loaded.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return loaded.to(tl.float32)


@triton.jit
@no_type_check
def find_items(
    i, g, feature, groups, ids, offsets, search_steps, out_width,
    BAD_IDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Find what the ids `i` of a group read and add to.

    Whether they read a row, their place among all ids, the row, where the vector that they add to
    begins, and what a mean divides by.
    """
    is_there = i < tl.load(groups + NUM_IDS * GROUPS + g)
    place = tl.load(groups + FIRST_ID * GROUPS + g) + i
    one = tl.load(ids + place, mask=is_there, other=0).to(tl.int64)
    row, is_good = resolve(one, tl.load(feature + ROWS), BAD_IDS)
    pooling = tl.load(feature + POOLING)
    vector = i.to(tl.int64)
    divisor = tl.full(i.shape, 1.0, tl.float32)
    if pooling != IS_NONE:
        first_bag = tl.load(groups + FIRST_BAG * GROUPS + g)
        num_bags = tl.load(groups + NUM_BAGS * GROUPS + g)
        bag = find_bag(offsets, place, first_bag, num_bags, search_steps)
        vector = bag - first_bag
        if pooling == IS_MEAN:
            length = tl.load(offsets + bag + 1) - tl.load(offsets + bag)
            divisor = tl.maximum(length, 1).to(tl.float32)
    stride = tl.where(out_width > 0, out_width, tl.load(feature + WIDTH))
    start = tl.load(groups + OUT * GROUPS + g) + vector * stride
    return is_there & is_good, place, row, start, divisor
