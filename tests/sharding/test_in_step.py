"""Ranks whose data ends at different times, or fails, stop or go on together."""

import pytest
import torch
import torch.distributed as dist

from shardwise.sharding import construct_module_sharding_plan, shard, table_wise
from shardwise.sharding.in_step import in_step, together, wire_of
from shardwise.sharding.wire import Wire
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

NUM_BATCHES = [4, 2, 3]


def loop(rank, world_size, has_length, when_short):
    """Sum batches over the ranks in every step; batch i of rank r is 10 r + i."""
    wire = Wire(dist.group.WORLD, name="test")
    batches = [10 * rank + i for i in range(NUM_BATCHES[rank])]
    source = batches if has_length else iter(batches)
    empty = {"empty": lambda: 0} if when_short == "join" else {}
    loop = in_step(source, wire, when_short, **empty)
    sums = [int(wire.all_reduce(torch.tensor(batch), tag="step")) for batch in loop]
    return sums, loop.left_over


@pytest.mark.parametrize(("has_length", "left_over"), [(True, [2, 0, 1]), (False, [1, 0, 1])])
def test_all_stop_with_the_shortest_and_count_what_is_left(ranks, has_length, left_over):
    assert ranks(3, loop, has_length, "stop") == [([30, 33], left_over)] * 3


def test_ranks_without_data_join_with_empty_batches(ranks):
    assert ranks(3, loop, True, "join") == [([30, 33, 24, 3], [0, 0, 0])] * 3


def read_badly(rank, world_size):
    wire, used = Wire(dist.group.WORLD, name="test"), []

    def batches():
        yield from range(2)
        if rank == 1:
            raise KeyError("no column 'clicks'")
        yield 2

    with pytest.raises(KeyError, match="rank 1: no column 'clicks'"):
        used.extend(in_step(batches(), wire))
    return used


def test_an_error_of_one_loader_is_raised_on_all_after_the_same_step(ranks):
    assert ranks(3, read_badly) == [[0, 1]] * 3


def run_again(rank, world_size):
    wire = Wire(dist.group.WORLD, name="test")
    batches = in_step([1, 2], wire)
    return [list(batches) for _ in range(3)], list(in_step([], wire)), batches.left_over


def test_each_epoch_begins_anew(ranks):
    assert ranks(2, run_again) == [([[1, 2]] * 3, [], [0, 0])] * 2


def bags():
    return EmbeddingBagCollection([EmbeddingBagConfig(8, 4, "t", feature_names=["f"])])


def fail(rank, model):
    with together(model):
        if rank == 1:
            raise ValueError("bad")


def use_the_model(rank, world_size):
    """The model's own ranks serve, also those that hold none of its tables."""
    collection = bags()
    plan = construct_module_sharding_plan(collection, {"t": table_wise(rank=0)})
    model = torch.nn.Sequential(shard(collection, plan))
    assert list(in_step([1, 2][rank:], model)) == [[1, 2][rank]]
    with pytest.raises(ValueError, match="rank 1: bad"):
        fail(rank, model)


def test_a_sharded_model_knows_its_ranks(ranks):
    assert ranks(2, use_the_model) == [None, None]


def test_what_does_not_fit_is_refused():
    wire = Wire(name="test")
    with pytest.raises(ValueError, match="EmbeddingBagCollection has no sharded tables"):
        wire_of(bags())
    with pytest.raises(ValueError, match="when_short='wait'"):
        in_step([1], wire, "wait")
    with pytest.raises(ValueError, match="'join' needs `empty`"):
        in_step([1], wire, "join")
