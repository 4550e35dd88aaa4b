"""The exchange equals the plain lookup: what must agree to the bit, and what nearly."""

import pytest
import torch

from shardwise.ops.lookup import BadIds
from shardwise.sharding.codecs import BF16, FP8, FP16, INT8, Codecs
from tests.sharding.plain import (
    MEAN,
    NONE,
    SUM,
    Case,
    as_call,
    by_columns,
    by_rows,
    connect,
    differences,
    draw,
    everywhere,
    grid,
    shape_of,
    shard,
    whole,
)

WORLD_SIZES = (1, 2, 4)


def mixed(world_size: int, **options) -> tuple:
    """A table of each kind."""
    return (
        whole("whole", world_size - 1, **options),
        by_rows("rows", world_size, **options),
        by_columns("columns", world_size, **options) if world_size > 1 else whole("c", 0),
        everywhere("everywhere", world_size),
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whole_tables_and_column_slices_equal_the_plain_lookup_to_the_bit(ranks, world_size):
    tables = (whole("a", world_size - 1), mixed(world_size)[2])
    found = differences(ranks, world_size, Case(tables, ((0, 0, SUM), (1, 1, SUM), (0, 1, MEAN))))
    assert (found.outputs, found.rows) == (0, 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_element_wise_rules_on_partials_update_rows_to_the_bit(ranks, world_size, rule):
    tables = (whole("a", world_size - 1), by_rows("b", world_size), mixed(world_size)[2])
    case = Case(tables, ((0, 0, SUM), (1, 1, SUM), (0, 1, SUM), (1, 2, SUM)), rule=rule)
    found = differences(ranks, world_size, case)
    assert found.outputs < 1e-6
    assert (found.rows, found.states) == (0, 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_vectors_of_ids_equal_the_plain_lookup_to_the_bit(ranks, world_size):
    tables = mixed(world_size)
    case = Case(tables, ((0, 0, NONE), (1, 1, NONE), (0, 2, NONE)), steps=1)
    found = differences(ranks, world_size, case)
    assert found.outputs == 0
    assert found.rows < 1e-6


@pytest.mark.parametrize("answer", ["partials", "rows"])
@pytest.mark.parametrize("is_variable", [False, True])
@pytest.mark.parametrize("when", ["backward", "step", "dense", "sparse"])
def test_weighted_and_plain_pooling_of_mixed_tables(ranks, answer, is_variable, when):
    features = ((0, 0, SUM), (1, 1, MEAN), (0, 2, SUM), (1, 3, SUM), (0, 1, SUM))
    case = Case(mixed(2, answer=answer), features, when=when, is_variable=is_variable)
    for is_weighted in (False, True):
        case = Case(**{**vars(case), "is_weighted": is_weighted})
        found = differences(ranks, 2, case)
        assert max(found.outputs, found.rows, found.weights) < 1e-6


def test_rank_without_a_slice_takes_part(ranks):
    found = differences(ranks, 4, Case((whole("a", 2),), ((0, 0, SUM),), is_weighted=True))
    assert (found.outputs, found.rows) == (0, 0)
    assert found.weights < 1e-6


@pytest.mark.parametrize("policy", [BadIds.CLIP, BadIds.HASH, BadIds.IGNORE])
@pytest.mark.parametrize("answer", ["partials", "rows"])
def test_bad_ids_are_treated_as_in_the_plain_lookup(ranks, policy, answer):
    features = ((0, 0, SUM), (1, 1, MEAN), (0, 2, MEAN), (1, 3, SUM))
    case = Case(mixed(2, answer=answer), features, is_weighted=True, bad_ids=policy)
    found = differences(ranks, 2, case)
    assert max(found.outputs, found.rows, found.weights) < 1e-6


@pytest.mark.parametrize("policy", [BadIds.CLIP, BadIds.IGNORE])
def test_bad_ids_of_sequences_are_treated_as_in_the_plain_lookup(ranks, policy):
    features = ((0, 0, NONE), (1, 1, NONE), (0, 3, NONE))
    found = differences(ranks, 2, Case(mixed(2), features, bad_ids=policy))
    assert max(found.outputs, found.rows) < 1e-6


# ---- several collections


def train_some(rank: int, ranks: int, used: tuple[str, ...]) -> tuple[bool, bool]:
    """Look two collections up, and go back through one that is named for each rank."""
    case = Case((whole("a", 0), by_rows("b", ranks)), ((0, 0, SUM), (0, 1, SUM)), when="sparse")
    outputs, slices, wire = {}, {}, connect(case, ranks)
    for name in "xy":
        exchange, slices[name], _ = shard(case, wire, [torch.ones(13, 8)] * 2, name)
        batch = draw(case, rank, 0)
        way = exchange.plan_backward([], is_sparse=True)
        arguments = (as_call(case, batch), shape_of(case, batch), slices[name], way)
        outputs[name] = exchange(*arguments, lambda error: error)
    outputs[used[rank]].sum().backward()
    return tuple(all(table.grad is not None for table in slices[name]) for name in "xy")


@pytest.mark.parametrize(("used", "have"), [("x", (True, False)), ("y", (False, True))])
def test_collection_without_gradient_sends_nothing_back(ranks, used, have):
    assert ranks(2, train_some, (used, used)) == [have, have]


def test_ranks_that_go_back_through_different_collections_are_named(ranks):
    with pytest.raises(RuntimeError, match=r"gradients of x.*rank 1 is at 'gradients of y"):
        ranks(2, train_some, ("x", "y"))


def look_up_without_grad(rank: int, ranks: int) -> bool:
    case = Case(mixed(ranks), ((0, 0, SUM), (0, 1, SUM), (0, 3, SUM)))
    exchange, slices, _ = shard(case, connect(case, ranks), [torch.ones(13, 8)] * 4)
    batch = draw(case, rank, 0)
    arguments = (as_call(case, batch), shape_of(case, batch), slices, exchange.plan_backward([]))
    with torch.no_grad():
        return exchange(*arguments, lambda error: error).requires_grad


def test_result_without_grad_mode_has_no_graph(ranks):
    assert ranks(2, look_up_without_grad) == [False, False]


# ---- weights of one rank, faults, codecs


def ask_on_one_rank(rank: int, ranks: int):
    case = Case(
        (whole("a", 0), everywhere("b", ranks)), ((0, 0, SUM), (0, 1, SUM)), is_weighted=True
    )
    tables = [torch.ones(13, 8), torch.ones(13, 8)]
    exchange, slices, _ = shard(case, connect(case, ranks), tables)
    call = as_call(case, draw(case, rank, 0))
    call.weights.requires_grad_(rank == 1)
    for table in slices:  # only the weights of rank 1 want gradients
        table.requires_grad_(False)
    way = exchange.plan_backward([])
    out = exchange(call, shape_of(case, draw(case, rank, 0)), slices, way, lambda error: error)
    out.sum().backward()
    return call.weights.grad


def test_gradients_of_weights_may_be_asked_for_by_one_rank(ranks):
    first, second = ranks(2, ask_on_one_rank)
    assert first is None
    assert second.unique().tolist() == [16.0]  # 8 columns of ones from each table


def look_up_bad_id(rank: int, ranks: int, table: str):
    case = Case((whole("a", 0), everywhere("b", ranks)), ((0, 0, SUM), (1, 1, SUM)))
    exchange, slices, _ = shard(case, connect(case, ranks), [torch.ones(13, 8)] * 2)
    call = as_call(case, draw(case, rank, 0))
    if rank == 1:
        call.ids[0 if table == "a" else -1] = 13
    with pytest.raises(RuntimeError) as found:
        exchange(call, (3 + rank, 16), slices, exchange.plan_backward([]), lambda error: error)
    return str(found.value)


@pytest.mark.parametrize(("table", "number"), [("a", 0), ("b", 1)])
def test_bad_id_of_one_rank_is_an_error_on_all(ranks, table, number):
    for text in ranks(2, look_up_bad_id, table):
        assert text.startswith(f"rank 1: shardwise: feature {number}, bag ")
        assert text.endswith(f"id 13 is outside table {number} of 13 rows")


def give_bad_offsets(rank: int, ranks: int) -> str:
    case = Case((whole("a", 0), everywhere("b", ranks)), ((0, 0, SUM), (1, 1, SUM)))
    exchange, slices, _ = shard(case, connect(case, ranks), [torch.ones(13, 8)] * 2)
    call = as_call(case, draw(case, rank, 0))._replace(bags=torch.empty(0, dtype=torch.int64))
    if rank == 1:
        call = call._replace(offsets=call.offsets[:-1])
    with pytest.raises(RuntimeError, match="rank 1") as found:
        exchange(call, (3 + rank, 16), slices, exchange.plan_backward([]), lambda error: error)
    return str(found.value)


def test_bad_offsets_of_one_rank_are_an_error_on_all(ranks):
    text = "rank 1: 7 bags cannot be shared by 2 inputs equally"
    assert ranks(2, give_bad_offsets) == [text] * 2


def explain_by_raising(rank: int, ranks: int) -> str:
    case = Case((whole("a", 0),), ((0, 0, SUM),))
    exchange, slices, _ = shard(case, connect(case, ranks), [torch.ones(13, 8)])
    call = as_call(case, draw(case, rank, 0))
    call.ids[0] += 20 * rank

    def explain(error: RuntimeError) -> Exception:
        raise ValueError("key 'x' has a negative length")

    with pytest.raises(ValueError, match="rank 1") as found:
        exchange(call, (3 + rank, 8), slices, exchange.plan_backward([]), explain)
    return str(found.value)


def test_fault_found_while_explaining_another_is_raised_on_all(ranks):
    text = "rank 1: key 'x' has a negative length"
    assert ranks(2, explain_by_raising) == [text] * 2


def refuse(rank: int, ranks: int):
    case = Case((whole("a", 0),), ((0, 0, SUM),))
    exchange, slices, _ = shard(case, connect(case, ranks), [torch.ones(13, 8)])
    call = as_call(case, draw(case, rank, 0))
    way = exchange.plan_backward([])
    arguments = (call, (3 + rank, 8), slices, way, lambda error: error)
    with pytest.raises(KeyError) as found:
        exchange.refuse(KeyError("no feature 'x'")) if rank == 1 else exchange(*arguments)
    return found.value.args[0]


def test_error_before_the_lookup_is_raised_on_all(ranks):
    assert ranks(2, refuse) == ["rank 1: no feature 'x'"] * 2


@pytest.mark.parametrize(
    ("codec", "limit"), [(FP16, 2**-10), (BF16, 2**-7), (FP8, 2**-3), (INT8, 2**-6)]
)
def test_codecs_keep_results_within_their_precision(ranks, codec, limit):
    tables = (by_rows("a", 2), grid("b", (0, 13), (0, 16, 32), [[0, 1]]))
    case = Case(tables, ((0, 0, SUM), (1, 1, MEAN)), codecs=Codecs(codec, codec), steps=1)
    found = differences(ranks, 2, case)
    assert 0 < found.outputs < limit
    assert found.rows < limit
