"""The lookup operators equal their reference: outputs, every gradient, every rule and dtype."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import library
from shardwise.ops.lookup import (
    RULES,
    BadIds,
    Ids,
    Pooling,
    Rule,
    Settings,
    Update,
    apply_update,
    count_bad_ids,
    lookup,
    plan_backward,
    reference,
    restrict,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 4, 16, 32, 64, 100, 128, 256, 1024]
NO_WEIGHTS = torch.empty(0)
NO_BAGS = torch.empty(0, dtype=torch.int64)


@dataclass
class Case:
    """A call, its tables and a gradient of its result."""

    tables: list[Tensor]
    call: Ids
    shape: tuple[int, int]
    grad: Tensor


def make_case(  # noqa: PLR0913  # each a dimension of the grid
    tables=((10, 4), (7, 16)),
    features=((0, 0, Pooling.SUM), (1, 1, Pooling.SUM)),
    bags=3,
    sources=1,
    longest=4,
    dtype=torch.float32,
    is_weighted=False,
    columns=True,
    id_dtype=torch.int64,
    seed=0,
) -> Case:
    """Draw ids for features (input, table, pooling) of tables (rows, width)."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*size, generator=generator).to(dtype) for size in tables]
    rows = torch.tensor([(k, t, p, tables[t][1]) for k, t, p in features])
    inputs = max(k for k, _, _ in features) + 1
    smallest = [min([tables[t][0] for j, t, _ in features if j == k] or [1]) for k in range(inputs)]
    if columns:
        counts = torch.full((inputs, 1), bags)
    else:
        counts = torch.randint(0, bags + 1, (inputs, sources), generator=generator)
    lengths, ids = [], []
    for source, k in itertools.product(range(counts.shape[1]), range(inputs)):
        lengths.append(
            torch.randint(0, longest + 1, (int(counts[k, source]),), generator=generator)
        )
        many = int(lengths[-1].sum())
        ids.append(torch.randint(0, smallest[k], (many,), generator=generator))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)
    flat = torch.cat(ids).to(id_dtype)
    weights = torch.rand(flat.numel(), generator=generator) if is_weighted else NO_WEIGHTS
    call = Ids(flat, offsets, weights, is_weighted, rows, counts, columns, BadIds.RAISE)
    if columns:
        shape = (bags, int(rows[:, 3].sum()))
    else:
        shape = (sum(g.num_rows * g.width for g in reference.groups(call, 1)), 1)
    return Case(made, call, shape, torch.randn(shape, generator=generator))


def run(case: Case, way=None) -> Tensor:
    way = way or plan_backward(case.call.features, len(case.tables))
    return lookup(case.tables, case.call, case.shape, way=way)


def expected(case: Case) -> Tensor:
    return reference.lookup(case.call, case.tables, *case.shape)


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare sums kept in float32, or rows rounded to `dtype` once."""
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_equals_reference_at_every_width(pooling, is_weighted, dtype):
    for width in WIDTHS:
        case = make_case(
            [(50, width)],
            [(0, 0, pooling)],
            bags=9,
            dtype=dtype,
            is_weighted=is_weighted,
            columns=False,
            sources=2,
        )
        close(run(case), expected(case))


@pytest.mark.parametrize("bags", [0, 1, 63, 1000])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_forward_equals_reference_at_every_batch_size(bags, id_dtype):
    features = [(0, 0, Pooling.SUM), (1, 1, Pooling.MEAN), (0, 1, Pooling.MEAN)]
    case = make_case(features=features, bags=bags, id_dtype=id_dtype)
    close(run(case), expected(case))


@pytest.mark.parametrize("widths", [(1024,), (1024, 20)])
def test_results_past_the_cache_equal_the_reference(widths):
    features = [(0, t, Pooling.SUM) for t in range(len(widths))]
    case = make_case([(50, width) for width in widths], features, bags=9000, longest=2)
    close(run(case), expected(case))


@pytest.mark.parametrize("pooling", Pooling)
def test_bags_of_one_id_equal_the_reference(pooling):
    case = make_case([(50, 64)], [(0, 0, pooling)], bags=300, columns=False)
    count = case.call.ids.numel()
    offsets, bags = torch.arange(count + 1), torch.tensor([[count]])
    call = case.call._replace(offsets=offsets, bags=bags)
    single = replace(case, call=call, shape=(count, 64))
    assert torch.equal(run(single), case.tables[0][case.call.ids])


@pytest.mark.parametrize("columns", [True, False])
def test_int32_offsets_give_the_same(columns):
    case = make_case(columns=columns, sources=1 if columns else 3)
    narrow = replace(case, call=case.call._replace(offsets=case.call.offsets.int()))
    assert torch.equal(run(narrow), run(case))


def test_forward_equals_embedding_bag():
    case = make_case([(20, 8)], [(0, 0, Pooling.MEAN)], bags=63)
    bag = torch.nn.functional.embedding_bag(
        case.call.ids, case.tables[0], case.call.offsets, mode="mean", include_last_offset=True
    )
    close(run(case), bag)


def test_empty_bags_give_zeros_also_for_mean():
    case = make_case([(5, 4)], [(0, 0, Pooling.MEAN)], bags=3, longest=0)
    assert torch.equal(run(case), torch.zeros(3, 4))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70)), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=60)
def test_any_layout_equals_reference(sizes, data):
    features = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 3), st.integers(0, len(sizes) - 1), st.sampled_from(list(Pooling))
            ),
            min_size=1,
            max_size=5,
        )
    )
    case = make_case(
        sizes,
        features,
        bags=data.draw(st.integers(0, 12)),
        sources=data.draw(st.integers(1, 3)),
        longest=data.draw(st.integers(0, 9)),
        is_weighted=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        columns=False,
        seed=data.draw(st.integers(0, 1000)),
    )
    close(run(case), expected(case))
    touched = reference.touched_rows(case.grad, case.call, case.tables)
    rows, flat, counts = torch.ops.shardwise.row_grads(case.grad, *case.call, case.tables)
    assert torch.equal(rows, torch.cat([t.rows for t in touched]))
    assert counts.tolist() == [t.rows.numel() for t in touched]
    close(flat, torch.cat([t.grad.flatten() for t in touched]))
    weights = torch.ops.shardwise.weight_grads(case.grad, *case.call, case.tables)
    close(weights, reference.weight_grads(case.grad, case.call, case.tables), torch.float16)


# ---- backward


def plain_gradients(case: Case, **options) -> list[Tensor]:
    tables = [table.clone().requires_grad_() for table in case.tables]
    way = plan_backward(case.call.features, len(tables), **options)
    out = run(replace(case, tables=tables), way)
    return torch.autograd.grad(out, tables, case.grad)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_dense_gradient_equals_autograd_of_indexing(pooling, is_weighted):
    case = make_case([(9, 5)], [(0, 0, pooling)], 63, is_weighted=is_weighted, columns=False)
    table = case.tables[0].double().requires_grad_()
    (group,) = reference.groups(case.call, 1)
    bag, lengths = reference.bag_of_ids(case.call, group)
    scale = case.call.weights.double() if is_weighted else torch.ones(bag.numel()).double()
    if pooling == Pooling.MEAN:
        scale = scale / lengths[bag]
    out = torch.zeros(group.num_rows, 5).double()
    out = out.index_add(0, bag, table[case.call.ids] * scale[:, None])
    (wanted,) = torch.autograd.grad(out, table, case.grad.double().view_as(out))
    close(plain_gradients(case)[0], wanted.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_gradient_is_the_coalesced_dense_one(dtype):
    case = make_case(bags=63, dtype=dtype)
    for sparse, dense in zip(
        plain_gradients(case, is_sparse=True), plain_gradients(case), strict=True
    ):
        assert sparse.is_sparse
        assert sparse.is_coalesced()
        assert sparse.dtype == dtype
        close(sparse.to_dense().float(), dense.float(), dtype)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_equals_reference(pooling, dtype):
    features = [(0, 0, pooling), (1, 1, Pooling.SUM), (0, 2, pooling)]
    case = make_case(
        [(9, 5), (8, 64), (9, 5)], features, 63, is_weighted=True, columns=False, dtype=dtype
    )
    weights = case.call.weights.clone().requires_grad_()
    out = run(replace(case, call=case.call._replace(weights=weights)))
    (grad,) = torch.autograd.grad(out, weights, case.grad)
    close(grad, reference.weight_grads(case.grad, case.call, case.tables))


def test_second_derivatives_are_refused_and_not_silently_zero():
    case = make_case()
    case.tables[0].requires_grad_()
    (grad,) = torch.autograd.grad((run(case) ** 2).sum(), case.tables[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def make_update(case: Case, rule: Rule, seed=-1, in_backward=True, tables=None, **numbers):
    tables = tables or tuple(range(len(case.tables)))
    generator = torch.Generator().manual_seed(1)
    states = []
    for t in tables:
        rows, width = case.tables[t].shape
        for _, kind in rule.states:
            size = (rows,) if kind == "row" else (rows, width)
            states.append(torch.rand(size, generator=generator))
    slots = [(t + 5, 100 * t, 7, case.tables[t].shape[1] + 3 * t) for t in tables]
    return Update(
        rule=rule,
        settings=Settings(**numbers),
        tables=tables,
        features=restrict(case.call.features, tables),
        states=states,
        steps=torch.full((len(tables),), 3),
        slots=torch.tensor(slots),
        lr=torch.tensor(0.1),
        seed=seed,
        in_backward=in_backward,
    )


def copy(case: Case, update: Update) -> tuple[Case, Update]:
    return (
        replace(case, tables=[t.clone() for t in case.tables]),
        replace(update, states=[s.clone() for s in update.states], steps=update.steps.clone()),
    )


def update_by_reference(case: Case, update: Update, sums=NO_WEIGHTS) -> None:
    call = case.call._replace(features=update.features)
    rules = reference.Rules(
        [case.tables[t] for t in update.tables],
        update.states,
        update.steps,
        update.slots,
        update.rule.code,
        update.settings.as_floats(),
    )
    reference.update_(case.grad, call, rules, update.seed, update.lr, sums)


def check_update(case: Case, update: Update) -> None:
    """Update in backward and by the reference, and compare rows, states and steps."""
    wanted_case, wanted = copy(case, update)
    update_by_reference(wanted_case, wanted)
    tables = [t.requires_grad_() for t in case.tables]
    way = plan_backward(case.call.features, len(tables), [update])
    run(case, way).backward(case.grad)
    for table, row in zip(case.tables, wanted_case.tables, strict=True):
        close(table.detach().float(), row.float(), table.dtype)
    for state, value in zip(update.states, wanted.states, strict=True):
        close(state, value)
    assert torch.equal(update.steps, wanted.steps)


def update_grid(is_full: bool) -> list:
    """Rule x dtype x pooling x weighting x decay; the sample has every pair of rule and dtype."""
    grid = []
    poolings, weightings = list(Pooling), [False, True]
    decays = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}]
    for i, (rule, dtype) in enumerate(itertools.product(RULES, DTYPES)):
        choices = list(itertools.product(poolings, weightings, decays))
        for pooling, is_weighted, decay in choices if is_full else [choices[i % len(choices)]]:
            name = f"{rule.name}-{dtype}-{pooling.name}-{is_weighted}-{decay}"
            grid.append(pytest.param(rule, dtype, pooling, is_weighted, decay, id=name))
    return grid


def check_rule(rule, dtype, pooling, is_weighted, decay, widths):
    for width in widths:
        case = make_case(
            [(40, width), (7, 8)],
            [(0, 0, pooling), (1, 1, Pooling.SUM), (1, 0, pooling)],
            bags=63,
            dtype=dtype,
            is_weighted=is_weighted,
            columns=False,
            sources=2,
        )
        check_update(case, make_update(case, rule, max_gradient=2.5, eps=0.01, **decay))


@pytest.mark.parametrize(("rule", "dtype", "pooling", "is_weighted", "decay"), update_grid(False))
def test_every_rule_equals_reference(rule, dtype, pooling, is_weighted, decay):
    check_rule(rule, dtype, pooling, is_weighted, decay, [1, 64, 100])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "dtype", "pooling", "is_weighted", "decay"), update_grid(True))
def test_every_rule_equals_reference_in_full(rule, dtype, pooling, is_weighted, decay):
    check_rule(rule, dtype, pooling, is_weighted, decay, WIDTHS)


@pytest.mark.parametrize("bags", [0, 1, 63, 1000])
def test_update_equals_reference_at_every_batch_size(bags):
    case = make_case([(300, 16), (5000, 8)], bags=bags, longest=20)
    check_update(case, make_update(case, RULES[2]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_rows_of_known_widths_that_occur_once_and_often_equal_reference(rule, width):
    case = make_case([(1000, width), (20_000, width)], bags=100, longest=12)
    check_update(case, make_update(case, rule))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1.2e4])
def test_stochastic_rounding_has_the_same_bits_as_the_reference(dtype, scale):
    case = make_case([(500, 20)], [(0, 0, Pooling.SUM)], bags=63, dtype=dtype)
    case.tables[0].mul_(scale)
    case.grad.mul_(scale)
    update = make_update(case, RULES[0], seed=2**40 + 17)
    wanted_case, wanted = copy(case, update)
    update_by_reference(wanted_case, wanted)
    case.tables[0].requires_grad_()
    run(case, plan_backward(case.call.features, 1, [update])).backward(case.grad)
    assert torch.equal(case.tables[0].detach(), wanted_case.tables[0])


def test_stochastic_rounding_is_right_on_average():
    table = torch.ones(20_000, 16, dtype=torch.bfloat16)
    case = Case(
        [table],
        Ids(
            torch.arange(20_000),
            torch.arange(20_001),
            NO_WEIGHTS,
            False,
            torch.tensor([(0, 0, Pooling.SUM, 16)]),
            NO_BAGS,
            True,
            BadIds.RAISE,
        ),
        (20_000, 16),
        torch.ones(20_000, 16),
    )
    update = replace(make_update(case, RULES[0], seed=1), lr=torch.tensor(1e-3))
    table.requires_grad_()
    run(case, plan_backward(case.call.features, 1, [update])).backward(case.grad)
    assert table.double().mean().item() == pytest.approx(1 - 1e-3, abs=2e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_given_row_sums_replace_the_rules_own(rule):
    case = make_case(bags=63)
    update = make_update(case, rule, eps=0.01)
    arguments = (update.states, update.steps, update.slots, rule.code, update.settings.as_floats())
    sums = torch.ops.shardwise.row_sums(
        case.grad, *case.call, case.tables, *arguments, torch.empty(0)
    )
    close(
        sums,
        reference.row_sums(
            case.grad, case.call, reference.Rules(case.tables, *arguments), torch.empty(0)
        ),
    )
    sums *= torch.rand_like(sums) + 0.5  # as where other ranks have added theirs
    wanted_case, wanted = copy(case, update)
    update_by_reference(wanted_case, wanted, sums)
    torch.ops.shardwise.update_(case.grad, *case.call, case.tables, *arguments, -1, update.lr, sums)
    for table, row in zip(case.tables, wanted_case.tables, strict=True):
        close(table, row)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_update_at_step_equals_update_in_backward(rule):
    case = make_case(bags=63)
    update = make_update(case, rule, eps=0.01)
    late_case, late = copy(case, update)
    late = replace(late, in_backward=False)
    check_update(case, update)
    grads = plain_gradients(late_case, updates=[late])
    rows = [grad.coalesce().indices()[0] for grad in grads]
    apply_update(late, late_case.tables, rows, [grad.coalesce().values() for grad in grads])
    for table, row in zip(case.tables, late_case.tables, strict=True):
        assert torch.equal(table.detach(), row)


def test_rows_given_twice_are_summed_before_the_update():
    table, state = torch.zeros(4, 2), torch.zeros(4)
    case = make_case([(4, 2)], [(0, 0, Pooling.SUM)])
    update = replace(
        make_update(case, RULES[2]), states=[state], slots=torch.tensor([[0, 0, 0, 2]])
    )
    grads = torch.tensor([[1.0, 3.0], [2.0, 4.0], [-1.0, -3.0]])
    apply_update(update, [table], [torch.tensor([1, 3, 1])], [grads])
    assert state.tolist() == [0.0, 0.0, 0.0, 10.0]
    assert table[1].tolist() == [0.0, 0.0]


def test_tables_of_one_lookup_may_have_different_ways():
    features = [(0, 0, Pooling.SUM), (1, 1, Pooling.SUM), (2, 2, Pooling.SUM)]
    case = make_case([(10, 4), (7, 16), (6, 3)], features, bags=9)
    fused = make_update(case, RULES[0], tables=(1,))
    late = make_update(case, RULES[0], tables=(2,), in_backward=False)
    before = case.tables[1].clone()
    dense = plain_gradients(case)
    tables = [table.requires_grad_() for table in case.tables]
    run(case, plan_backward(case.call.features, 3, [fused, late])).backward(case.grad)
    close(tables[0].grad, dense[0])
    assert tables[1].grad is None
    close(tables[1].detach(), before - 0.1 * dense[1])
    close(tables[2].grad.to_dense(), dense[2])


def test_two_lookups_before_one_backward_update_one_after_the_other():
    case = make_case([(6, 4)], [(0, 0, Pooling.SUM)], bags=9)
    update = make_update(case, RULES[2])
    wanted_case, wanted = copy(case, update)
    update_by_reference(wanted_case, wanted)
    update_by_reference(wanted_case, wanted)
    case.tables[0].requires_grad_()
    way = plan_backward(case.call.features, 1, [update])
    first, second = run(case, way), run(case, way)
    (first + second).backward(case.grad)
    close(case.tables[0].detach(), wanted_case.tables[0])
    assert update.steps.tolist() == [5]


def test_update_raises_the_tables_version():
    case = make_case([(6, 4)], [(0, 0, Pooling.SUM)])
    table = case.tables[0].requires_grad_()
    before = table._version
    run(case, plan_backward(case.call.features, 1, [make_update(case, RULES[0])])).sum().backward()
    assert table._version > before


def test_a_row_used_by_autograd_and_updated_before_its_backward_is_an_error():
    case = make_case([(6, 4)], [(0, 0, Pooling.SUM)])
    table = case.tables[0].requires_grad_()
    way = plan_backward(case.call.features, 1, [make_update(case, RULES[0])])
    kept = (table**2).sum()
    run(case, way).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_result_does_not_depend_on_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        case = make_case([(300, 64), (50, 16), (100_000, 64)], bags=1000, longest=30)
        update = make_update(case, RULES[2])
        for table in case.tables:
            table.requires_grad_()
        out = run(case, plan_backward(case.call.features, 3, [update]))
        out.backward(case.grad)
        results.append([out.detach(), *(t.detach() for t in case.tables), *update.states])
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- bad input


def bad_case(policy: BadIds, ids=(0, 9, -1, 2, 12)) -> Case:
    call = Ids(
        torch.tensor(ids),
        torch.tensor([0, 2, 5]),
        NO_WEIGHTS,
        False,
        torch.tensor([(0, 0, Pooling.SUM, 4)]),
        NO_BAGS,
        True,
        policy,
    )
    return Case([torch.randn(9, 4)], call, (2, 4), torch.randn(2, 4))


def test_bad_id_names_feature_bag_and_id():
    with pytest.raises(RuntimeError, match=r"feature 0, bag 0: id 9 is outside table 0 of 9 rows"):
        run(bad_case(BadIds.RAISE))


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_first_id_past_either_end_is_refused(bad, id_dtype):
    case = bad_case(BadIds.RAISE, ids=(0, 8, 2, bad, 1))
    call = case.call._replace(ids=case.call.ids.to(id_dtype))
    with pytest.raises(RuntimeError, match=f"bag 1: id {bad} is outside table 0 of 9 rows"):
        run(replace(case, call=call))


def test_bad_id_in_backward_changes_no_row():
    case = bad_case(BadIds.RAISE)
    update, before = make_update(case, RULES[2]), case.tables[0].clone()
    states = [state.clone() for state in update.states]
    arguments = (update.states, update.steps, update.slots, 2, update.settings.as_floats())
    with pytest.raises(RuntimeError, match="id 9"):
        torch.ops.shardwise.update_(
            case.grad, *case.call, case.tables, *arguments, -1, update.lr, torch.empty(0)
        )
    assert torch.equal(case.tables[0], before)
    assert torch.equal(update.states[0], states[0])
    assert update.steps.tolist() == [3]


@pytest.mark.parametrize("bad", [-1, 50])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_bad_id_of_one_table_in_backward_changes_no_row_of_another(bad, id_dtype):
    case = make_case([(9, 4), (50, 4)], bags=1000, longest=5)
    ids = case.call.ids.to(id_dtype)
    ids[-1] = bad  # of the last table
    update, before = make_update(case, RULES[2]), case.tables[0].clone()
    arguments = (update.states, update.steps, update.slots, 2, update.settings.as_floats())
    with pytest.raises(RuntimeError, match=f"id {bad} is outside table 1 of 50 rows"):
        torch.ops.shardwise.update_(
            case.grad,
            *case.call._replace(ids=ids),
            case.tables,
            *arguments,
            -1,
            update.lr,
            torch.empty(0),
        )
    assert torch.equal(case.tables[0], before)


@pytest.mark.parametrize(
    ("policy", "rows"),
    [(BadIds.CLIP, [[0, 8], [0, 2, 8]]), (BadIds.HASH, [[0, 0], [8, 2, 3]]),
     (BadIds.IGNORE, [[0], [2]])],
)  # fmt: skip
def test_bad_ids_follow_the_policy(policy, rows):
    case = bad_case(policy)
    wanted = torch.stack([case.tables[0][row].sum(0) for row in rows])
    close(run(case), wanted)
    check_update(case, make_update(case, RULES[2]))


def test_bad_ids_are_counted():
    case = bad_case(BadIds.IGNORE)
    assert count_bad_ids(case.tables, case.call, case.shape).tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3, 1, 5])}, "never decrease"),
        ({"offsets": torch.tensor([1, 2, 5])}, "start at 0"),
        ({"offsets": torch.tensor([0, 2, 4])}, "lengths sum to 4, but there are 5 ids"),
        ({"is_weighted": True, "weights": torch.ones(3)}, "3 weights for 5 ids"),
    ],
)
def test_bad_layout_is_one_clear_error(change, message):
    case = bad_case(BadIds.CLIP)
    with pytest.raises(RuntimeError, match=message):
        run(replace(case, call=case.call._replace(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bags": torch.tensor([[3]])}, "bags"),
        ({"features": torch.tensor([(0, 0, 0, 5)])}, "width 5 does not fit"),
        ({"features": torch.tensor([(-1, 0, 0, 4)])}, "input -1"),
        ({"bad_ids": 7}, "unknown policy"),
        ({"ids": torch.tensor([0.0] * 5)}, "int32 or int64"),
    ],
)
def test_bad_arguments_are_refused_by_the_compiled_operator(change, message):
    if not library.is_compiled:
        pytest.skip("needs the compiled operators")
    case = bad_case(BadIds.CLIP)
    with pytest.raises(RuntimeError, match=message):
        run(replace(case, call=case.call._replace(**change)))


# ---- more


def test_rows_past_2_to_31_elements_are_found(untouched_memory):
    """The table is virtual: only the pages that are touched exist."""
    rows, width = 2**27 + 3, 16  # 8.6 GB of address space
    table = torch.empty(rows, width)
    last = torch.tensor([rows - 1, 2**27, 1])
    table[last] = torch.arange(48.0).view(3, 16)
    case = replace(
        bad_case(BadIds.RAISE),
        tables=[table],
        call=bad_case(BadIds.RAISE).call._replace(
            ids=last,
            offsets=torch.tensor([0, 1, 3]),
            features=torch.tensor([(0, 0, Pooling.SUM, 16)]),
        ),
        shape=(2, 16),
    )
    assert run(case)[0].tolist() == list(range(16))
    state = torch.empty(rows)
    state[last] = 0.0
    update = Update(
        rule=RULES[2],
        settings=Settings(),
        tables=(0,),
        features=case.call.features,
        states=[state],
        steps=torch.zeros(1, dtype=torch.int64),
        slots=torch.tensor([[0, 0, 0, 16]]),
        lr=torch.tensor(1.0),
    )
    apply_update(update, [table], [last], [torch.ones(3, 16)])
    torch.testing.assert_close(table[last], torch.arange(48.0).view(3, 16) - 1)


@pytest.mark.parametrize("operator", ["lookup", "count_bad_ids", "update_", "weight_grads"])
def test_opcheck(operator):
    case = make_case(bags=4, is_weighted=True)
    update = make_update(case, RULES[2])
    op = getattr(torch.ops.shardwise, operator).default
    if operator in ("lookup", "count_bad_ids"):
        arguments = (*case.call, case.tables, *case.shape)
    else:
        arguments = (case.grad, *case.call, case.tables)
    if operator == "update_":
        arguments += (update.states, update.steps, update.slots, 2, update.settings.as_floats())
        arguments += (-1, update.lr, torch.empty(0))
    torch.library.opcheck(op, arguments)


def test_opcheck_of_results_of_unknown_size():
    case = make_case(bags=4)
    update = make_update(case, RULES[2])
    checks = ("test_schema", "test_faketensor")
    row_grads = torch.ops.shardwise.row_grads.default
    torch.library.opcheck(row_grads, (case.grad, *case.call, case.tables), test_utils=checks)
    arguments = (update.states, update.steps, update.slots, 2, update.settings.as_floats())
    row_sums = torch.ops.shardwise.row_sums.default
    torch.library.opcheck(
        row_sums,
        (case.grad, *case.call, case.tables, *arguments, torch.empty(0)),
        test_utils=checks,
    )
