"""The Triton kernels, where they can run: on a CUDA device, or on the CPU under the interpreter.

`test_interpreter` runs this file under the interpreter.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardwise.ops import library
from shardwise.ops.lookup import RULES, BadIds, Ids, Pooling, Rule, Update, reference, restrict
from tests.ops.test_lookup import (
    NO_BAGS,
    NO_WEIGHTS,
    Case,
    bad_case,
    close,
    copy,
    expected,
    make_case,
    make_update,
    update_by_reference,
)

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if CUDA else []
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or Triton's interpreter", allow_module_level=True)

from shardwise.ops.lookup import gpu, gpu_layout, gpu_rows  # noqa: E402  # needs Triton

DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Make several programs of few vectors each, also of small calls."""
    monkeypatch.setattr(gpu_layout, "TILE", 64)
    monkeypatch.setattr(gpu_rows, "ITEMS", 64)


def to_device(call: Ids) -> Ids:
    moved = {name: getattr(call, name).to(DEVICE) for name in ("ids", "offsets", "weights")}
    return call._replace(**moved)


def look_up(case: Case) -> Tensor:
    tables = [table.to(DEVICE) for table in case.tables]
    return gpu.lookup(*to_device(case.call), tables, *case.shape).cpu()


def run_update(case: Case, update: Update) -> None:
    """Run an update on the device, and bring tables, states and steps back."""
    tables, states = ([t.to(DEVICE) for t in own] for own in (case.tables, update.states))
    gpu.update_(
        case.grad.to(DEVICE),
        *to_device(case.call._replace(features=update.features)),
        tables,
        states,
        update.steps,
        update.slots,
        update.rule.code,
        update.settings.as_floats(),
        update.seed,
        update.lr,
        NO_WEIGHTS,
    )
    for value, moved in zip([*case.tables, *update.states], [*tables, *states], strict=True):
        value.copy_(moved)


def check(case: Case, update: Update) -> None:
    wanted_case, wanted = copy(case, update)
    update_by_reference(wanted_case, wanted)
    run_update(case, update)
    for table, row in zip(case.tables, wanted_case.tables, strict=True):
        close(table.float(), row.float(), table.dtype)
    for state, value in zip(update.states, wanted.states, strict=True):
        close(state, value)


@pytest.mark.parametrize("pooling", Pooling)
def test_many_small_programs_give_the_same(pooling, small_tiles):
    features = [(0, 0, pooling), (1, 1, Pooling.MEAN), (0, 1, Pooling.SUM)]
    case = make_case([(50, 12), (7, 16)], features, 9, sources=3, columns=False, is_weighted=True)
    close(look_up(case), expected(case))
    check(case, make_update(case, RULES[2]))


def test_tables_of_several_dtypes_in_one_call():
    case = make_case([(9, 8), (8, 16), (7, 4)], [(k, k, Pooling.SUM) for k in range(3)], bags=9)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    case.tables = [table.to(dtype) for table, dtype in zip(case.tables, dtypes, strict=True)]
    close(look_up(case), expected(case))
    check(case, make_update(case, RULES[3]))


def hot_case(width: int = 8) -> Case:
    """One row is read by 700 of 800 ids, another by 65 of them."""
    case = make_case([(40, width)], [(0, 0, Pooling.NONE)], 800, longest=0, columns=False)
    ids = torch.cat([torch.full((700,), 3), torch.full((65,), 17), torch.arange(35)])
    ids = ids[torch.randperm(800)]
    call = case.call._replace(ids=ids, offsets=torch.arange(801), bags=torch.tensor([[800]]))
    shape = (800, width)
    return replace(case, call=call, shape=shape, grad=torch.randn(shape))


def test_long_runs_are_summed_in_pieces():
    case = hot_case()
    runs = gpu_rows.group_rows(
        case.grad.to(DEVICE), to_device(case.call), [t.to(DEVICE) for t in case.tables]
    )
    assert runs.num_runs.item() == 35
    assert runs.piece_ends[34].item() == 11 + 2  # 700 / 64 and 66 / 64, rounded up
    case.grad /= 16  # sums of hundreds, within the tolerance of sums of ones
    check(case, make_update(case, RULES[2]))


def test_a_slice_of_columns_gets_the_bits_of_the_whole_row():
    case = hot_case(width=24)
    part = replace(
        case,
        tables=[case.tables[0][:, :10].contiguous()],
        call=case.call._replace(features=torch.tensor([(0, 0, Pooling.NONE, 10)])),
        shape=(800, 10),
        grad=case.grad[:, :10].contiguous(),
    )
    run_update(case, make_update(case, RULES[0]))
    run_update(part, make_update(part, RULES[0]))
    assert torch.equal(part.tables[0], case.tables[0][:, :10])


@pytest.mark.skipif(not library.is_compiled, reason="needs the compiled operators")
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[3]], ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_are_those_of_the_cpu(rule: Rule, dtype):
    case = make_case(
        [(300, 23), (50, 16)],
        [(0, 0, Pooling.SUM), (1, 1, Pooling.MEAN)],
        bags=33,
        dtype=dtype,
        is_weighted=True,
    )
    wanted = torch.ops.shardwise.lookup(*case.call, case.tables, *case.shape)
    assert torch.equal(look_up(case), wanted)
    update = make_update(case, rule, seed=2**40 + 17, weight_decay=0.1, eps=0.01)
    own_case, own = copy(case, update)
    run_update(own_case, own)
    arguments = (update.states, update.steps, update.slots, rule.code, update.settings.as_floats())
    torch.ops.shardwise.update_(
        case.grad, *case.call, case.tables, *arguments, update.seed, update.lr, NO_WEIGHTS
    )
    for value, wanted in zip(
        [*own_case.tables, *own.states], [*case.tables, *update.states], strict=True
    ):
        assert torch.equal(value, wanted)


def test_keys_of_more_than_31_bits(untouched_memory):
    """The table is virtual on the CPU: only the pages that are touched exist."""
    rows = 2**32 + 5
    table = torch.empty(rows, 1, dtype=torch.float16, device=DEVICE)
    ids = torch.tensor([rows - 1, 5, rows - 1, 2**31])
    table[ids] = 1.0
    call = Ids(
        ids.to(DEVICE),
        torch.arange(5, device=DEVICE),
        NO_WEIGHTS,
        False,
        torch.tensor([(0, 0, Pooling.SUM, 1)]),
        NO_BAGS,
        True,
        BadIds.RAISE,
    )
    found, flat, _ = gpu.row_grads(torch.ones(4, 1, device=DEVICE), *call, [table])
    assert found.tolist() == [5, 2**31, rows - 1]
    assert flat.tolist() == [1.0, 1.0, 2.0]


# ---- what is wrong is said at a later call


def test_a_bad_id_counts_as_absent_and_is_named_by_a_later_call():
    case = bad_case(BadIds.RAISE, ids=(0, 8, 2, 9, 1))
    tables = [table.to(DEVICE) for table in case.tables]
    call = to_device(case.call)
    out = gpu.lookup(*call, tables, *case.shape).cpu()
    close(out, torch.stack([case.tables[0][row].sum(0) for row in ([0, 8], [2, 1])]))
    with pytest.raises(RuntimeError, match=r"feature 0, bag 1: id 9 is outside table 0 of 9 rows"):
        gpu.raise_bad_ids()
    good = to_device(bad_case(BadIds.RAISE, ids=(0, 8, 2, 3, 1)).call)
    gpu.lookup(*good, tables, *case.shape)
    gpu.raise_bad_ids()


def test_the_next_lookup_of_the_same_tables_raises():
    case = bad_case(BadIds.RAISE, ids=(0, 8, 2, -1, 1))
    tables = [table.to(DEVICE) for table in case.tables]
    gpu.lookup(*to_device(case.call), tables, *case.shape)
    if CUDA:
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="id -1 is outside table 0"):
        gpu.lookup(*to_device(case.call), tables, *case.shape)


def test_a_bad_id_updates_nothing():
    case = bad_case(BadIds.RAISE, ids=(0, 8, 2, 9, 1))
    ignored = replace(case, call=case.call._replace(bad_ids=BadIds.IGNORE))
    update = make_update(case, RULES[2])
    wanted_case, wanted = copy(ignored, update)
    update_by_reference(wanted_case, wanted)
    run_update(case, update)
    close(case.tables[0], wanted_case.tables[0])
    close(update.states[0], wanted.states[0])


@pytest.mark.parametrize("offsets", [[0, 3, 1, 5], [1, 2, 5], [0, 2, 4], [0, 2, 9]])
def test_wrong_offsets_are_named_by_a_later_call(offsets):
    case = bad_case(BadIds.CLIP)
    call = to_device(case.call._replace(offsets=torch.tensor(offsets)))
    shape = (len(offsets) - 1, 4)
    gpu.lookup(*call, [table.to(DEVICE) for table in case.tables], *shape)
    with pytest.raises(RuntimeError, match="offsets must start at 0, never decrease"):
        gpu.raise_bad_ids()


def test_what_the_host_can_see_is_refused_at_once():
    case = bad_case(BadIds.CLIP)
    wide = case.call._replace(features=torch.tensor([(0, 0, 0, 5)]))
    with pytest.raises(RuntimeError, match="feature 0 of width 5 does not fit its table"):
        look_up(replace(case, call=wide, shape=(2, 5)))


def test_features_that_an_update_does_not_own_are_left_out():
    case = make_case([(10, 4), (7, 16)], bags=9)
    update = replace(make_update(case, RULES[0]), features=restrict(case.call.features, (1,)))
    own = replace(case, tables=case.tables[1:])
    update = replace(update, slots=update.slots[1:], steps=update.steps[1:], tables=(1,))
    rows = reference.touched_rows(case.grad, case.call, case.tables)[1]
    before = own.tables[0].clone()
    run_update(own, update)
    before[rows.rows] -= 0.1 * rows.grad
    close(own.tables[0], before)
