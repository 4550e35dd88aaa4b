"""What goes wrong on one rank is an error on all, soon, that says where and what."""

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardwise.jagged import KeyedJaggedTensor
from shardwise.sharding import (
    ShardingEnv,
    ShardingPlan,
    construct_module_sharding_plan,
    row_wise,
    shard,
)
from shardwise.sharding.agreement import check_equal_plans
from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

TIMEOUT_S = 2.0
LONG_S = 20.0  # where none is waited for in vain, whatever else the machine does


def outcome(rank, world_size, scenario, *args):
    """Run a scenario, and give its error and how long it took."""
    waits = scenario in (load_for_too_long, wait_in_another_message)
    wire = Wire(dist.group.WORLD, name="test", timeout_s=TIMEOUT_S if waits else LONG_S)
    started = time.monotonic()
    try:
        scenario(rank, wire, *args)
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return type(error), f"{error} {notes}", time.monotonic() - started
    return None, "", time.monotonic() - started


def send(wire, tag, size=4, lane="ids", is_agreed=False):
    sizes = [size] * wire.world_size
    message = torch.zeros(sum(sizes))
    wire.all_to_all(message, sizes, sizes, tag=tag, lane=lane, is_agreed=is_agreed).wait()


def use_collections_in_another_order(rank, wire):
    for name, size in [("a", 4), ("b", 400)][:: -1 if rank == 1 else 1]:
        send(wire, f"counts of {name} (tables {name}0, {name}1)", size)


def test_another_order_of_collections_is_named_at_once(ranks):
    for kind, text, _ in ranks(3, outcome, use_collections_in_another_order):
        assert kind is RuntimeError
        assert "rank 0 is at 'counts of a (tables a0, a1)', rank 1 is at 'counts of b" in text
        assert "rank 2" not in text


def differ_in_the_backward(rank, wire):
    send(wire, "counts of a")
    if rank != 1:
        send(wire, "gradients of a", 8, lane="answers")
    send(wire, "counts of a")


def test_a_rank_that_runs_no_backward_is_named_at_once(ranks):
    for kind, text, _ in ranks(2, outcome, differ_in_the_backward):
        assert kind is RuntimeError
        assert "rank 0 is at 'gradients of a', rank 1 is at 'counts of a'" in text


def compare_plans(rank, wire):
    placements = [Placement(t, (0, 8), (0, 4), (((0,),),), "rows") for t in ("first", "second")]
    if rank == 1:
        placements[1] = Placement("second", (0, 8), (0, 4), (((1,),),), "rows")
    check_equal_plans({"model.bags": placements}, wire)


def test_another_plan_is_named_with_its_table(ranks):
    for kind, text, _ in ranks(2, outcome, compare_plans):
        assert kind is ValueError
        assert "rank 1 has table 'second' of module 'model.bags'" in text


def load_for_too_long(rank, wire):
    send(wire, "counts of bags (table t)")
    if rank == 1:
        time.sleep(TIMEOUT_S + 2.5)
    send(wire, "counts of bags (table t)")


def test_a_rank_that_does_not_come_is_named_with_its_last_message(ranks):
    kind, text, took_s = ranks(2, outcome, load_for_too_long)[0]
    assert kind is RuntimeError
    assert "counts of bags (table t) failed" in text
    assert "rank 1 has not come: since" in text
    assert "is in no collective; its last was counts of bags (table t)" in text
    assert TIMEOUT_S <= took_s < TIMEOUT_S + 10


def wait_in_another_message(rank, wire):
    send(wire, "counts of bags")
    send(wire, "ids of bags" if rank else "answer of bags", 4, "answers" if rank else "ids", True)


def test_ranks_that_wait_for_different_messages_say_so(ranks):
    for rank, (kind, text, _) in enumerate(ranks(2, outcome, wait_in_another_message)):
        names = ["answer of bags", "ids of bags"]
        assert kind is RuntimeError
        assert f"{names[rank]} failed" in text
        assert f"rank {1 - rank} waits for {names[1 - rank]} instead" in text


def raise_in_one_rank(rank, wire, is_agreed):
    with wire.together("the step"):
        send(wire, "counts of bags")
        if rank == 1:
            raise IndexError("feature 'f', sample 3: id 99 is outside table 't' of 50 rows")
        send(wire, "ids of bags", is_agreed=is_agreed)


@pytest.mark.parametrize("is_agreed", [False, True])
def test_what_one_rank_raises_all_raise(ranks, is_agreed):
    for kind, text, _ in ranks(3, outcome, raise_in_one_rank, is_agreed):
        assert kind is IndexError
        assert "rank 1: feature 'f', sample 3: id 99 is outside table 't' of 50 rows" in text


def fail_together(rank, wire, step):
    with wire.together("the step"):
        send(wire, "counts of bags")
        if rank != 1:
            raise ValueError(step)


def raise_and_go_on(rank, wire):
    for step in range(3):
        with pytest.raises(ValueError, match=f"rank 0: {step}"):
            fail_together(rank, wire, step)
    send(wire, "counts of bags")
    assert wire.gather_texts(str(rank)) == ["0", "1", "2"]


def test_ranks_go_on_after_an_error_that_all_raised(ranks):
    assert [kind for kind, *_ in ranks(3, outcome, raise_and_go_on)] == [None] * 3


class OddError(LookupError):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_on_several(rank, wire):
    wire.raise_together([None, OddError(1, 2), KeyError("k")][rank])


def test_the_lowest_ranks_error_comes_first_and_the_others_are_notes(ranks):
    for kind, text, _ in ranks(3, outcome, raise_on_several):
        assert kind is RuntimeError
        assert text == "rank 1: OddError: 1 and 2 and rank 2: k"


def two_collections(is_one_model, timeout_s):
    """Two tables that lie in slices: of one model, or each by itself."""
    bags = {
        name: EmbeddingBagCollection([EmbeddingBagConfig(50, 4, name, feature_names=["f"])])
        for name in ("first", "second")
    }
    model = torch.nn.ModuleDict(bags)
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    env = ShardingEnv.from_process_group(group)
    plans = {
        name: construct_module_sharding_plan(one, {name: row_wise()}) for name, one in bags.items()
    }
    if is_one_model:
        shard(model, ShardingPlan(plans), env)
    else:
        for name, one in bags.items():
            shard(one, plans[name], env)
    return list(bags.values())


def look_up(collection, bad_id=0):
    ids, lengths = torch.tensor([3, 49, bad_id]), torch.tensor([2, 0, 1])
    return collection(KeyedJaggedTensor(["f"], ids, lengths=lengths)).values()


def use_tables(rank, wire, what, is_one_model=True):
    waits = what == "absence" or not is_one_model
    first, second = two_collections(is_one_model, TIMEOUT_S if waits else LONG_S)
    for step in range(3):
        is_odd = rank == 1 and step == 1
        if what == "order" and is_odd:
            first, second = second, first
        if what == "absence" and is_odd:
            time.sleep(TIMEOUT_S + 2.5)
        look_up(first, 77 if what == "id" and is_odd else 0)
        values = look_up(second)
        if what != "eval" or not is_odd:
            values.sum().backward()


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("id", IndexError, "rank 1: feature 'f', sample 2: id 77 is outside table 'first'"),
        (
            "order",
            RuntimeError,
            "rank 0 is at 'ids of first (tables first)', rank 1 is at 'ids of s",
        ),
        ("eval", RuntimeError, "rank 0 is at 'gradients of second (tables second)', rank 1 is at"),
    ],
)
def test_sharded_tables_name_at_once_what_goes_wrong(ranks, what, kind, text):
    for its_kind, its_text, _ in ranks(2, outcome, use_tables, what):
        assert its_kind is kind
        assert text in its_text


def test_sharded_tables_name_a_rank_that_does_not_come(ranks):
    kind, text, _ = ranks(2, outcome, use_tables, "absence")[0]
    assert kind is RuntimeError
    assert "ids of first (tables first) failed" in text
    assert "rank 1 has not come: since" in text


def test_models_in_another_order_name_each_other(ranks):
    outcomes = ranks(2, outcome, use_tables, "order", False)
    names = ["ids of the collection (tables first)", "ids of the collection (tables second)"]
    for name, (kind, text, _) in zip(names, outcomes, strict=True):
        assert kind is RuntimeError
        assert f"{name} failed" in text
    instead = [f"rank {1 - rank} waits for {names[1 - rank]} instead" for rank in range(2)]
    # The one that comes to it a little later may find the other gone.
    assert any(part in text for part, (_, text, _) in zip(instead, outcomes, strict=True))


def lose_a_peer(rank, folder, results):
    """Rank 1 is killed while rank 0 waits for it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", 2)
    limit = timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    wire = Wire(dist.group.WORLD, name="test")
    send(wire, "counts of bags (table t)")
    if rank == 1:
        os.kill(os.getpid(), 9)
    try:
        send(wire, "counts of bags (table t)")
    except RuntimeError as error:
        results.put(str(error))


def test_a_killed_peer_is_named(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [
        context.Process(target=lose_a_peer, args=(rank, str(tmp_path), results)) for rank in (0, 1)
    ]
    for process in both:
        process.start()
    text = results.get(timeout=50)
    assert "counts of bags (table t) failed" in text
    assert "rank 1 gives no sign of life: it has ended, or is cut off" in text
    for process in both:
        process.join()
        process.close()
