"""Group a call's gradients by row, on the GPU and without waiting for it.

Every (feature, id) pair is an item, in the order [feature][source][bag]. Items are sorted by
(table, row), equal ones in their order, and a run of equal ones is a touched row. A run of more
than `PIECE` items is cut into about as many pieces as a piece has items, and these are summed
first, side by side: a row that all ids read takes twice the square root of their number in steps.
Every order is fixed by the ids alone, so results are repeatable.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardwise.ops.lookup.gpu_layout import (
    FEATURE_FIELDS,
    FIRST_ITEM,
    TABLE,
    UNSPECIALIZED,
    choose_tile,
    find_group,
    find_items,
    is_aligned,
    lay_out,
    on_device,
)
from shardwise.ops.lookup.reference import MEAN, Ids

PIECE = 64  # items that are summed one after the other, at most; a power of two
ITEMS = 512  # items that a program of the other kernels takes

_PIECE = tl.constexpr(PIECE)


class Runs(NamedTuple):
    """The touched rows, table after table and ascending, with the gradients of each.

    Attributes:
        keys: Sorted (table << row_bits | row) of the items; those that read no row come last.
        starts: The first item of each touched row, and the end of the last one.
        num_runs: Touched rows, on the device.
        places: Where each item's gradient begins, in elements.
        scales: What each item's gradient is multiplied by; empty where that is 1.
        piece_ends: Pieces up to each touched row, itself included. Empty: no run is cut.
        pieces: The sums of the pieces [pieces, columns of a tile].
        grad: The gradient.
        widths: Columns of each table.
        row_bits: Bits of a key that hold the row.
        tile: Vectors, and columns, of a program's tile.
        is_aligned: Whether every gradient begins at a multiple of 16 bytes.
    """

    keys: Tensor
    starts: Tensor
    num_runs: Tensor
    places: Tensor
    scales: Tensor
    piece_ends: Tensor
    pieces: Tensor
    grad: Tensor
    widths: Tensor
    row_bits: int
    tile: tuple[int, int]
    is_aligned: bool

    @property
    def num_programs(self) -> int:
        """Programs that take a tile of touched rows each, if every item had a row of its own."""
        return -(-self.keys.numel() // self.tile[0])

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Give the arguments with which every kernel on touched rows begins."""
        return (
            *(self.keys, self.starts, self.num_runs, self.places, self.scales, self.piece_ends),
            *(self.pieces, self.grad, self.widths, self.row_bits),
        )

    def options(self) -> dict[str, int | bool]:
        """Give the constants that go with `arguments`."""
        return {
            "IS_SCALED": self.scales.numel() > 0,
            "IS_ALIGNED": self.is_aligned,
            "HAS_PIECES": self.piece_ends.numel() > 0,
            "ROW_TILE": self.tile[0],
            "COLUMN_TILE": self.tile[1],
        }

    def rows(self) -> tuple[Tensor, list[int]]:
        """Give the touched rows and how many each table has. Waits for the device."""
        keys = self.keys[self.starts[: int(self.num_runs)]]
        last = torch.arange(1, self.widths.numel() + 1, device=keys.device) << self.row_bits
        ends = torch.searchsorted(keys, last.to(keys.dtype)).tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return (keys & ((1 << self.row_bits) - 1)).long(), counts


def group_rows(grad: Tensor, call: Ids, tables: list[Tensor]) -> Runs:
    """Sort the items of a call by row and cut long runs.

    Args:
        grad: Gradient of the result, float32 and contiguous.
        call: As the lookup's.
        tables: The tables.
    """
    if grad.dtype != torch.float32 or not grad.is_contiguous() or grad.dim() != 2:
        raise RuntimeError("shardwise: the gradient must be float32 [rows, width], contiguous")
    device = grad.device
    row_bits = max(max((table.shape[0] - 1).bit_length() for table in tables), 1)
    none = len(tables) << row_bits  # the key of an item that reads no row
    key_dtype = torch.int32 if none < 2**31 else torch.int64
    layout = lay_out(call, tables, grad, ITEMS, by_id=True)
    count = layout.num_items
    is_scaled = call.is_weighted or bool((call.features[:, 2] == MEAN).any())
    keys = torch.full((count,), none, dtype=key_dtype, device=device)
    places = torch.empty(count, dtype=torch.int64, device=device)
    scales = torch.empty(count if is_scaled else 0, device=device)
    runs = Runs(
        keys=keys,
        starts=torch.full((count + 1,), count, dtype=torch.int64, device=device),
        num_runs=torch.zeros(1, dtype=torch.int64, device=device),
        places=torch.empty_like(places),
        scales=torch.empty_like(scales),
        piece_ends=places[:0],
        pieces=scales[:0],
        grad=grad,
        widths=on_device(device, tuple(table.shape[1] for table in tables)),
        row_bits=row_bits,
        tile=choose_tile(tables),
        is_aligned=is_aligned(tables) and grad.data_ptr() % 16 == 0,
    )
    if count == 0:
        return runs
    _list_items[(layout.num_blocks,)](
        *layout.arguments(call),
        *(keys, places, scales),
        grad.shape[1] if call.columns else 0,
        row_bits,
        BAD_IDS=call.bad_ids,
        IS_WEIGHTED=call.is_weighted,
        IS_SCALED=is_scaled,
        TILE=ITEMS,
        GROUPS=layout.padded,
    )
    sorted_keys, order = torch.sort(keys, stable=True)
    is_start = torch.ones(count, dtype=torch.bool, device=device)
    torch.ne(sorted_keys[1:], sorted_keys[:-1], out=is_start[1:])
    runs = runs._replace(keys=sorted_keys)
    _list_runs[(triton.cdiv(count, ITEMS),)](
        *(sorted_keys, order, is_start, is_start.cumsum(0)),
        *(places, scales, runs.places, runs.scales, runs.starts, runs.num_runs),
        *(count, none),
        IS_SCALED=is_scaled,
        TILE=ITEMS,
    )
    return _sum_pieces(runs) if count > PIECE else runs


def _sum_pieces(runs: Runs) -> Runs:
    count, device = runs.keys.numel(), runs.grad.device
    counts = torch.empty(count, dtype=torch.int64, device=device)
    _count_pieces[(triton.cdiv(count, ITEMS),)](
        runs.starts, runs.num_runs, counts, count, TILE=ITEMS
    )
    # A run of n > PIECE items has at most n / PIECE + 1 < 2 n / PIECE pieces.
    most = 2 * count // PIECE
    runs = runs._replace(
        piece_ends=counts.cumsum(0), pieces=torch.empty(most, runs.tile[1], device=device)
    )
    _sum[(triton.cdiv(most, runs.tile[0]),)](
        *(runs.keys, runs.starts, runs.num_runs, runs.places, runs.scales, runs.piece_ends),
        *(runs.grad, runs.widths, runs.pieces, count, runs.row_bits, count.bit_length()),
        IS_SCALED=runs.scales.numel() > 0,
        IS_ALIGNED=runs.is_aligned,
        ROW_TILE=runs.tile[0],
        COLUMN_TILE=runs.tile[1],
        enable_fp_fusion=False,
    )
    return runs


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _list_items(
    features, groups, ids, offsets, weights, num_ids, num_features, search_steps,
    keys, places, scales, out_width, row_bits,
    BAD_IDS: tl.constexpr, IS_WEIGHTED: tl.constexpr, IS_SCALED: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    g, block = find_group(groups, tl.program_id(0), GROUPS)
    if g == GROUPS:
        return
    feature = features + (g % num_features) * FEATURE_FIELDS
    i = block * TILE + tl.arange(0, TILE)
    is_there, place, row, start, divisor = find_items(
        i, g, feature, groups, ids, offsets, search_steps, out_width, BAD_IDS, GROUPS
    )
    item = tl.load(groups + FIRST_ITEM * GROUPS + g) + i
    key = (tl.load(feature + TABLE) << row_bits) | row
    tl.store(keys + item, key.to(keys.dtype.element_ty), mask=is_there)
    tl.store(places + item, start, mask=is_there)
    if IS_SCALED:
        if IS_WEIGHTED:
            scale = tl.div_rn(tl.load(weights + place, mask=is_there, other=0.0), divisor)
        else:
            scale = tl.div_rn(tl.full(i.shape, 1.0, tl.float32), divisor)
        tl.store(scales + item, scale, mask=is_there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _list_runs(
    keys, order, is_start, run_numbers, places, scales, sorted_places, sorted_scales,
    starts, num_runs, num_items, no_row,
    IS_SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write where runs start, how many there are, and places and scales in their order."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = i < num_items
    has_row = is_there & (tl.load(keys + i, mask=is_there, other=0) != no_row)
    item = tl.load(order + i, mask=has_row, other=0)
    tl.store(sorted_places + i, tl.load(places + item, mask=has_row, other=0), mask=has_row)
    if IS_SCALED:
        scale = tl.load(scales + item, mask=has_row, other=0.0)
        tl.store(sorted_scales + i, scale, mask=has_row)
    run = tl.load(run_numbers + i, mask=is_there, other=1) - 1
    begins = tl.load(is_start + i, mask=is_there, other=0) != 0
    tl.store(starts + run, i, mask=begins & is_there)
    tl.store(num_runs + i * 0, run + has_row.to(tl.int64), mask=i == num_items - 1)


@triton.jit
@no_type_check
def _piece_length(length):
    """Give the items of a piece: the least doubling of PIECE whose square holds the run."""
    piece = tl.full(length.shape, _PIECE, tl.int64)
    for _ in tl.static_range(16):
        piece = tl.where(piece * piece < length, piece * 2, piece)
    return piece


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _count_pieces(starts, num_runs, counts, num_items, TILE: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_there = run < tl.load(num_runs)
    begin = tl.load(starts + run, mask=is_there, other=0)
    length = tl.load(starts + run + 1, mask=is_there, other=0) - begin
    piece = _piece_length(length)
    pieces = tl.where(length > _PIECE, (length + piece - 1) // piece, 0)
    tl.store(counts + run, pieces, mask=run < num_items)


@triton.jit
@no_type_check
def _add_items(
    total, place, end, places, scales, grad, width, columns,
    IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the gradient of one item to each vector of the tile."""
    is_there = place < end
    start = tl.load(places + place, mask=is_there, other=0)
    if IS_ALIGNED:
        start = tl.multiple_of(start, (4,))
    mask = is_there[:, None] & (columns[None, :] < width[:, None])
    values = tl.load(grad + start[:, None] + columns[None, :], mask=mask, other=0.0)
    if IS_SCALED:
        values *= tl.load(scales + place, mask=is_there, other=0.0)[:, None]
    return total + values


@triton.jit
@no_type_check
def sum_items(
    begin, end, places, scales, grad, width, columns,
    IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, UNROLL: tl.constexpr = 4,
):  # fmt: skip
    """Sum the gradients of the items [begin, end) of each vector of the tile, item by item."""
    total = tl.zeros((ROW_TILE, COLUMN_TILE), tl.float32)
    total = _add_items(
        total, begin, end, places, scales, grad, width, columns, IS_SCALED, IS_ALIGNED
    )
    for i in range(1, tl.max(end - begin, 0), UNROLL):
        for j in tl.static_range(UNROLL):
            total = _add_items(
                total, begin + (i + j), end, places, scales, grad, width, columns,
                IS_SCALED, IS_ALIGNED,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _sum(
    keys, starts, num_runs, places, scales, piece_ends, grad, widths, pieces,
    num_items, row_bits, search_steps,
    IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    """Sum each piece of the runs that are cut."""
    number = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    num_pieces = tl.load(piece_ends + num_items - 1)
    if tl.program_id(0) * ROW_TILE >= num_pieces:
        return
    is_there = number < num_pieces
    # The run of a piece is the first one that ends after it.
    low = number * 0
    high = low + num_items
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_left = tl.load(piece_ends + middle, mask=middle < num_items, other=0) > number
        high = tl.where(is_left, middle, high)
        low = tl.where(is_left, low, middle + 1)
    run = tl.where(is_there, high, 0)
    first = tl.load(starts + run)
    stop = tl.load(starts + run + 1)
    piece = _piece_length(stop - first)
    before = tl.load(piece_ends + run - 1, mask=run > 0, other=0)
    begin = first + (number - before) * piece
    end = tl.where(is_there, tl.minimum(begin + piece, stop), begin)
    table = tl.load(keys + first) >> row_bits
    width = tl.load(widths + table, mask=is_there, other=0)
    if IS_ALIGNED:
        width = tl.multiple_of(width, (4,))
    columns = tl.arange(0, COLUMN_TILE)
    total = sum_items(
        begin, end, places, scales, grad, width, columns,
        IS_SCALED, IS_ALIGNED, ROW_TILE, COLUMN_TILE,
    )  # fmt: skip
    start = (number * COLUMN_TILE)[:, None] + columns[None, :]
    tl.store(pieces + start, total, mask=is_there[:, None])


@triton.jit
@no_type_check
def open_run(
    keys, starts, num_runs, widths, row_bits, IS_ALIGNED: tl.constexpr, ROW_TILE: tl.constexpr
):
    """Give the touched rows of a program: number, whether there is one, table, row and columns."""
    run = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    live = run < tl.load(num_runs)
    key = tl.load(keys + tl.load(starts + run, mask=live, other=0), mask=live, other=0)
    key = key.to(tl.int64)
    table = key >> row_bits
    row = key - (table << row_bits)
    width = tl.load(widths + table)
    if IS_ALIGNED:
        width = tl.multiple_of(width, (4,))
    return run, live, table, row, width


@triton.jit
@no_type_check
def sum_run(
    run, live, starts, places, scales, piece_ends, pieces, grad, width, columns,
    IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_PIECES: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of each touched row of the tile: its items, or its pieces where cut."""
    begin = tl.load(starts + run, mask=live, other=0)
    end = tl.load(starts + run + 1, mask=live, other=0)
    if HAS_PIECES:
        first = tl.load(piece_ends + run - 1, mask=live & (run > 0), other=0)
        last = tl.load(piece_ends + run, mask=live, other=0)
        last = tl.where(live, last, first)
        end = tl.where(last > first, begin, end)
    total = sum_items(
        begin, end, places, scales, grad, width, columns,
        IS_SCALED, IS_ALIGNED, ROW_TILE, COLUMN_TILE,
    )  # fmt: skip
    if HAS_PIECES:
        for i in range(tl.max(last - first, 0)):
            is_there = first + i < last
            start = ((first + i) * COLUMN_TILE)[:, None] + columns[None, :]
            mask = is_there[:, None] & (columns[None, :] < width[:, None])
            total += tl.load(pieces + start, mask=mask, other=0.0)
    return total
