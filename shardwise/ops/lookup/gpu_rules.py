"""Update rules on the GPU: sum the gradient of each touched row and run the rule on it, fused.

The formulas are those of `rules` and of the CPU operators, operation by operation, with exact
division and square root: rules without row sums give the same bits as on the CPU. Row sums are
added in another order.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardwise.ops.lookup.gpu_layout import (
    DTYPES,
    UNSPECIALIZED,
    is_aligned,
    load_float,
    on_device,
    pointers,
)
from shardwise.ops.lookup.gpu_rows import Runs, open_run, sum_run
from shardwise.ops.lookup.reference import Rules
from shardwise.ops.lookup.rules import (
    ADAGRAD,
    ADAM,
    LAMB,
    LARS_SGD,
    PARTIAL_ROW_WISE_ADAM,
    PARTIAL_ROW_WISE_LAMB,
    ROW_WISE_ADAGRAD,
    RULES,
    SGD,
)

_SGD, _ADAGRAD, _ROW_WISE_ADAGRAD, _ADAM, _PARTIAL_ADAM, _LAMB, _PARTIAL_LAMB, _LARS = (
    tl.constexpr(rule.code)
    for rule in (
        *(SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, PARTIAL_ROW_WISE_ADAM),
        *(LAMB, PARTIAL_ROW_WISE_LAMB, LARS_SGD),
    )
)

# Numbers kept of a table.
ADDRESS, DTYPE, SEED, KEY, FIRST_ROW, FIRST_COLUMN, FULL_WIDTH, STATE0, STATE1 = map(
    tl.constexpr, range(9)
)
TABLE_FIELDS = tl.constexpr(9)


def _check(rules: Rules) -> None:
    """Refuse states that would lead to wrong addresses."""
    kinds = RULES[rules.code].states
    count = len(rules.tables)
    fits = len(rules.states) == count * len(kinds) and rules.steps.numel() == count
    for i, state in enumerate(rules.states if fits else []):
        table, (_, kind) = rules.tables[i // len(kinds)], kinds[i % len(kinds)]
        wanted = table.shape[0] if kind == "row" else table.numel()
        fits &= state.numel() == wanted and state.dtype == torch.float32
        fits &= state.is_contiguous() and state.device == table.device
    if not fits or rules.slots.numel() != 4 * count:
        raise RuntimeError(
            f"shardwise: steps, slots or states do not fit {count} tables: a state of rule "
            f"{RULES[rules.code].name} is float32, contiguous and on the device of its table"
        )


def _table_numbers(rules: Rules, seed: int) -> tuple[int, ...]:
    """List the fields of every table; a state that the rule lacks has address 0."""
    kinds, numbers = len(RULES[rules.code].states), []
    for t, (table, slot) in enumerate(zip(rules.tables, rules.slots.tolist(), strict=True)):
        states = [state.data_ptr() for state in rules.states[t * kinds : (t + 1) * kinds]]
        numbers += [table.data_ptr(), DTYPES.index(table.dtype), seed, *slot]
        numbers += [*states, 0, 0][:2]
    return tuple(numbers)


def run_rule(
    runs: Runs,
    rules: Rules,
    *,
    lr: Tensor,
    given: Tensor,
    seed: int = -1,
    sums: Tensor | None = None,
) -> None:
    """Run a rule on the touched rows, or write its row sums alone.

    Args:
        runs: The touched rows.
        rules: The rule; its tables and states change in place, its steps do not.
        lr: The learning rate, one number.
        given: Row sums that replace the rule's own, or empty.
        seed: For stochastic rounding; -1 rounds to nearest.
        sums: Where to write the row sums [N, num_sums]; nothing else is changed then.
    """
    _check(rules)
    if runs.keys.numel() == 0:
        return
    rule, device = RULES[rules.code], runs.grad.device
    on_host = not (lr.is_cuda and rules.steps.is_cuda)
    if device.type == "cuda" and on_host and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "shardwise: a CUDA graph would keep the learning rate and the steps of its capture: "
            "make the optimizer of the tables under torch.device('cuda')"
        )
    eps, beta1, beta2, momentum, eta, weight_decay, is_decoupled, max_gradient = rules.floats
    steps = (rules.steps + 1).to(device, non_blocking=True)
    betas = [(1 - beta ** steps.double()).float() for beta in (beta1, beta2)]
    numbers = on_device(device, _table_numbers(rules, seed))
    has_given = given.numel() > 0 and rule.num_sums > 0
    for code in sorted({DTYPES.index(table.dtype) for table in rules.tables}):
        _run[(runs.num_programs,)](
            *runs.arguments(),
            *(numbers, steps, *betas, lr.to(device, torch.float32, non_blocking=True)),
            given if has_given else runs.grad,
            runs.grad if sums is None else sums,
            *(eps, beta1, beta2, 1 - beta1, 1 - beta2, momentum, eta, weight_decay),
            max_gradient,
            RULE=rules.code,
            CODE=code,
            NUM_SUMS=rule.num_sums,
            HAS_GIVEN=has_given,
            IS_ROUNDED=seed >= 0 and code > 0,
            IS_DECOUPLED=is_decoupled != 0,
            ONLY_SUMS=sums is not None,
            ARE_ROWS_ALIGNED=is_aligned(rules.tables)
            and all(state.data_ptr() % 16 == 0 for state in rules.states),
            **runs.options(),
            enable_fp_fusion=False,
        )


def write_grads(runs: Runs, bases: list[int], out: Tensor) -> None:
    """Write the summed gradient of touched row r, of table t, at bases[t] + r * columns."""
    if out.numel():
        starts = torch.tensor(bases, dtype=torch.int64).to(out.device, non_blocking=True)
        _write_grads[(runs.num_programs,)](
            *runs.arguments(), starts, out, **runs.options(), enable_fp_fusion=False
        )


@triton.jit
@no_type_check
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
@no_type_check
def _random_bits(about, step, row, columns):
    """Give 32 bits for each element of the rows; see `rounding`."""
    seed = tl.load(about + SEED)
    bits = _mix(seed.to(tl.uint32))
    bits = _mix(bits + (seed >> 32).to(tl.uint32))
    bits = _mix(bits + step.to(tl.uint32))
    bits = _mix(bits + tl.load(about + KEY).to(tl.uint32))
    row += tl.load(about + FIRST_ROW)
    bits = _mix(_mix(bits + row.to(tl.uint32)) + (row >> 32).to(tl.uint32))
    column = tl.load(about + FIRST_COLUMN)[:, None] + columns[None, :]
    return _mix(bits[:, None] ^ (column.to(tl.uint32) * 0x9E3779B1))


@triton.jit
@no_type_check
def _round_to_bfloat(raw, random):
    """Round the bits of float32 to those of a bfloat16, with zeros below; see `rounding`."""
    size = raw & 0x7FFFFFFF
    rounded = ((size + (random & 0xFFFF)) & 0xFFFF0000) | (raw & 0x80000000)
    return tl.where(size < 0x7F800000, rounded, raw)


@triton.jit
@no_type_check
def _round_to_half(raw, random):
    """Round the bits of float32 to those of a float32 that float16 holds; see `rounding`."""
    size = raw & 0x7FFFFFFF
    exponent = size >> 23
    normal = tl.minimum((size + (random & 0x1FFF)) & 0xFFFFE000, 0x477FE000)
    is_tiny = exponent < 113  # below 2^-14: a count of 2^-24, float16's smallest step
    shift = tl.minimum(tl.where(is_tiny, 126 - exponent, 0), 31)
    one = tl.full(shift.shape, 1, tl.uint32)
    units = (((size & 0x7FFFFF) | 0x800000) + (random & ((one << shift) - 1))) >> shift
    tiny = (units.to(tl.int32).to(tl.float32) * 5.960464477539063e-08).to(tl.uint32, bitcast=True)
    rounded = tl.where(is_tiny, tiny, normal) | (raw & 0x80000000)
    return tl.where(size < 0x7F800000, rounded, raw)


@triton.jit
@no_type_check
def _store_rows(
    pointer, values, mask, about, step, row, columns,
    CODE: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Store float32 as the table's dtype, rounded at random or to nearest even."""
    raw = values.to(tl.uint32, bitcast=True)
    if IS_ROUNDED:
        random = _random_bits(about, step, row, columns)
        raw = _round_to_bfloat(raw, random) if CODE == 2 else _round_to_half(raw, random)
    if CODE == 2:
        is_number = (raw & 0x7FFFFFFF) <= 0x7F800000
        nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        tl.store(pointer, tl.where(is_number, nearest, (raw >> 16) | 0x40).to(tl.uint16), mask=mask)
    elif CODE == 1:
        tl.store(pointer, raw.to(tl.float32, bitcast=True).to(tl.float16), mask=mask)
    else:
        tl.store(pointer, values, mask=mask)


@triton.jit
@no_type_check
def _trust(weight_squared, update_squared):
    """Norm of the row over norm of its update; 1 where either is zero."""
    is_there = (weight_squared > 0) & (update_squared > 0)
    norm = tl.sqrt_rn(tl.where(is_there, update_squared, 1.0))
    return tl.where(is_there, tl.div_rn(tl.sqrt_rn(weight_squared), norm), 1.0)


@triton.jit
@no_type_check
def _sum_or_given(
    values, index: tl.constexpr, given, run, live, NUM_SUMS: tl.constexpr, HAS_GIVEN: tl.constexpr
):
    """Give the sum of each row, or the given one."""
    if HAS_GIVEN:
        sums = tl.load(given + run * NUM_SUMS + index, mask=live, other=0.0)
    else:
        sums = tl.sum(values, 1)
    return sums


@triton.jit
@no_type_check
def _apply(
    w, g, about, table, place, row, run, live, mask, columns, corrections1, corrections2, given,
    rate, decay, eps, beta1, beta2, rest1, rest2, momentum, eta,
    RULE: tl.constexpr, NUM_SUMS: tl.constexpr, HAS_GIVEN: tl.constexpr, ONLY_SUMS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Give the step of each row, to be subtracted, and its sums; write the states."""
    states0 = pointers(tl.load(about + STATE0), place, 0, IS_ALIGNED)[:, None] + columns[None, :]
    states1 = pointers(tl.load(about + STATE1), place, 0, IS_ALIGNED)[:, None] + columns[None, :]
    HAS_MOMENTS: tl.constexpr = RULE >= _ADAM and RULE <= _PARTIAL_LAMB
    HAS_TRUST: tl.constexpr = (RULE == _LAMB) | (RULE == _PARTIAL_LAMB)
    IS_PARTIAL: tl.constexpr = (RULE == _PARTIAL_ADAM) | (RULE == _PARTIAL_LAMB)
    HAS_ROW_STATE: tl.constexpr = RULE == _ROW_WISE_ADAGRAD or IS_PARTIAL
    full_width = tl.load(about + FULL_WIDTH).to(tl.float32)
    changed = mask & (not ONLY_SUMS)
    changed_row = live & (not ONLY_SUMS)
    sum0 = tl.zeros(row.shape, tl.float32)
    sum1, sum2 = sum0, sum0
    step = rate * g
    if HAS_ROW_STATE:
        SLOT: tl.constexpr = STATE1 if IS_PARTIAL else STATE0
        row_states = tl.load(about + SLOT).to(tl.pointer_type(tl.float32)) + row
        sum0 = _sum_or_given(g * g, 0, given, run, live, NUM_SUMS, HAS_GIVEN)
        row_state = tl.load(row_states, mask=live, other=0.0)
        mean = tl.div_rn(sum0, full_width)
        row_state = (beta2 * row_state + rest2 * mean) if IS_PARTIAL else (row_state + mean)
        tl.store(row_states, row_state, mask=changed_row)
    if RULE == _ADAGRAD:
        total = tl.load(states0, mask=mask, other=0.0) + g * g
        tl.store(states0, total, mask=changed)
        step = tl.div_rn(rate * g, tl.sqrt_rn(total) + eps)
    elif RULE == _ROW_WISE_ADAGRAD:
        step = tl.div_rn(rate, tl.sqrt_rn(row_state) + eps)[:, None] * g
    elif HAS_MOMENTS:
        first = beta1 * tl.load(states0, mask=mask, other=0.0) + rest1 * g
        tl.store(states0, first, mask=changed)
        if IS_PARTIAL:
            second = row_state[:, None]
        else:
            second = beta2 * tl.load(states1, mask=mask, other=0.0) + rest2 * (g * g)
            tl.store(states1, second, mask=changed)
        correction1 = tl.load(corrections1 + table)[:, None]
        correction2 = tl.load(corrections2 + table)[:, None]
        root = tl.sqrt_rn(tl.div_rn(second, correction2)) + eps
        direction = tl.div_rn(tl.div_rn(first, correction1), root)
        step = rate * direction
        if HAS_TRUST:
            update = direction + decay * w
            # Of whole rows, the squared gradient may be given before the other two sums are.
            IS_WHOLE: tl.constexpr = HAS_GIVEN and not (ONLY_SUMS and IS_PARTIAL)
            AT: tl.constexpr = NUM_SUMS - 2
            sum1 = _sum_or_given(w * w, AT, given, run, live, NUM_SUMS, IS_WHOLE)
            sum2 = _sum_or_given(update * update, AT + 1, given, run, live, NUM_SUMS, IS_WHOLE)
            step = (rate * _trust(sum1, sum2))[:, None] * update
    elif RULE == _LARS:
        sum1 = _sum_or_given(w * w, 0, given, run, live, NUM_SUMS, HAS_GIVEN)
        sum2 = _sum_or_given(g * g, 1, given, run, live, NUM_SUMS, HAS_GIVEN)
        norm = tl.sqrt_rn(sum1)
        bound = tl.sqrt_rn(sum2) + decay * norm
        factor = tl.div_rn(rate * eta * norm, tl.where(bound > 0, bound, 1.0))
        factor = tl.where(bound > 0, factor, 0.0)[:, None]
        step = momentum * tl.load(states0, mask=mask, other=0.0) + factor * (g + decay * w)
        tl.store(states0, step, mask=changed)
    return step, sum0, sum1, sum2


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _run(
    keys, starts, num_runs, places, scales, piece_ends, pieces, grad, widths, row_bits,
    numbers, steps, corrections1, corrections2, lr, given, sums,
    eps, beta1, beta2, rest1, rest2, momentum, eta, weight_decay, max_gradient,
    RULE: tl.constexpr, CODE: tl.constexpr, NUM_SUMS: tl.constexpr, HAS_GIVEN: tl.constexpr,
    IS_ROUNDED: tl.constexpr, IS_DECOUPLED: tl.constexpr, ONLY_SUMS: tl.constexpr,
    ARE_ROWS_ALIGNED: tl.constexpr, IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr,
    HAS_PIECES: tl.constexpr, ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0).to(tl.int64) * ROW_TILE >= tl.load(num_runs):
        return
    run, live, table, row, width = open_run(
        keys, starts, num_runs, widths, row_bits, IS_ALIGNED, ROW_TILE
    )
    about = numbers + table * TABLE_FIELDS
    live = live & (tl.load(about + DTYPE) == CODE)
    columns = tl.arange(0, COLUMN_TILE)
    mask = live[:, None] & (columns[None, :] < width[:, None])
    g = sum_run(
        run, live, starts, places, scales, piece_ends, pieces, grad, width, columns,
        IS_SCALED, IS_ALIGNED, HAS_PIECES, ROW_TILE, COLUMN_TILE,
    )  # fmt: skip
    place = row * width
    rows = pointers(tl.load(about + ADDRESS), place, CODE, ARE_ROWS_ALIGNED)
    rows = rows[:, None] + columns[None, :]
    w = load_float(rows, mask, CODE)
    g = tl.where(g > max_gradient, max_gradient, tl.where(g < -max_gradient, -max_gradient, g))
    if not IS_DECOUPLED:
        g += weight_decay * w
    rate = tl.load(lr)
    change, sum0, sum1, sum2 = _apply(
        w, g, about, table, place, row, run, live, mask, columns,
        corrections1, corrections2, given, rate, weight_decay if IS_DECOUPLED else 0.0,
        eps, beta1, beta2, rest1, rest2, momentum, eta,
        RULE, NUM_SUMS, HAS_GIVEN, ONLY_SUMS, ARE_ROWS_ALIGNED,
    )  # fmt: skip
    if ONLY_SUMS:
        if NUM_SUMS != 2:
            tl.store(sums + run * NUM_SUMS, sum0, mask=live)
        if NUM_SUMS > 1:
            tl.store(sums + run * NUM_SUMS + NUM_SUMS - 2, sum1, mask=live)
            tl.store(sums + run * NUM_SUMS + NUM_SUMS - 1, sum2, mask=live)
    else:
        if IS_DECOUPLED and RULE < _LAMB:
            w = w * (1.0 - rate * weight_decay)
        step = tl.load(steps + table)
        _store_rows(rows, w - change, mask, about, step, row, columns, CODE, IS_ROUNDED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
@no_type_check
def _write_grads(
    keys, starts, num_runs, places, scales, piece_ends, pieces, grad, widths, row_bits,
    bases, out,
    IS_SCALED: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_PIECES: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    run, live, table, _, width = open_run(
        keys, starts, num_runs, widths, row_bits, IS_ALIGNED, ROW_TILE
    )
    columns = tl.arange(0, COLUMN_TILE)
    total = sum_run(
        run, live, starts, places, scales, piece_ends, pieces, grad, width, columns,
        IS_SCALED, IS_ALIGNED, HAS_PIECES, ROW_TILE, COLUMN_TILE,
    )  # fmt: skip
    start = tl.load(bases + table) + run * width
    mask = live[:, None] & (columns[None, :] < width[:, None])
    tl.store(out + start[:, None] + columns[None, :], total, mask=mask)
