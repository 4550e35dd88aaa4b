"""What ranks send arrives and is counted, also where there is one rank, or none is real."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.sharding.wire import Wire


def send_unequal_parts(rank, world_size, dtype):
    """Rank r sends q + 1 rows of the value 10 r + q to rank q."""
    wire = Wire(dist.group.WORLD, name="test")
    parts = [torch.full((q + 1, 3), 10 * rank + q, dtype=dtype) for q in range(world_size)]
    sizes = [q + 1 for q in range(world_size)]
    back = [rank + 1] * world_size
    pending = wire.all_to_all(torch.cat(parts), sizes, back, tag="rows", lane="answers")
    return pending.wait(), wire.traffic["rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_each_rank_gets_its_parts_in_rank_order(ranks, dtype):
    for rank, (received, _) in enumerate(ranks(3, send_unequal_parts, dtype)):
        expected = [torch.full((rank + 1, 3), 10 * p + rank, dtype=dtype) for p in range(3)]
        assert torch.equal(received, torch.cat(expected))


def test_bytes_are_counted_without_those_to_oneself(ranks):
    for rank, (_, sent) in enumerate(ranks(3, send_unequal_parts, torch.float32)):
        assert sent == (1 + 2 + 3 - (rank + 1)) * 3 * 4


def count_by_host(rank, world_size):
    wire = Wire(dist.group.WORLD, name="test", hosts=((0, 2), (1, 3)))
    sizes = [1, 2, 4, 8]
    wire.all_to_all(torch.zeros(15), sizes, [sizes[rank]] * 4, tag="rows", lane="ids").wait()
    counted = wire.traffic["rows"], wire.between_hosts["rows"]
    inner = wire.within_host()
    inner.all_to_all(torch.zeros(2), [1, 1], [1, 1], tag="relay", lane="answers").wait()
    return (*counted, wire.traffic["relay"], wire.between_hosts["relay"], inner.rank)


def test_bytes_between_hosts_are_counted_apart(ranks):
    assert ranks(4, count_by_host) == [
        (4 * 14, 4 * 10, 4, 0, 0),
        (4 * 13, 4 * 5, 4, 0, 0),
        (4 * 11, 4 * 10, 4, 0, 1),
        (4 * 7, 4 * 5, 4, 0, 1),
    ]


def reduce_and_tell(rank, world_size):
    wire = Wire(dist.group.WORLD, name="test")
    total = wire.all_reduce(torch.tensor(rank + 1), tag="sum")
    most = wire.all_reduce(torch.tensor(rank), op="max", tag="max")
    seed = wire.broadcast(torch.tensor(rank + 7), source=1, tag="seed")
    statuses = wire.meet("here", status=10 * rank).wait()
    return int(total), int(most), int(seed), statuses, wire.gather_texts("é" * rank)


def test_ranks_reduce_broadcast_and_tell(ranks):
    assert ranks(3, reduce_and_tell) == [(6, 2, 8, [0, 10, 20], ["", "é", "éé"])] * 3


def test_one_rank_needs_no_process_group():
    wire = Wire(name="test")
    sent = torch.arange(3)
    pending = wire.all_to_all(sent, [3], [3], tag="ids", lane="ids")
    assert torch.equal(pending.wait(), sent)
    assert wire.gather_texts("alone") == ["alone"]
    assert wire.meet("here", 3).wait() == [3]
    assert wire.within_host().world_size == 1
    assert wire.traffic.total() == 0
    with pytest.raises(KeyError, match="rank 0: missing"), wire.together("test"):
        raise KeyError("missing")


@pytest.fixture
def fake_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=1024)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_thousand_ranks_can_be_pretended(fake_ranks):
    hosts = tuple(tuple(range(first, first + 8)) for first in range(0, 1024, 8))
    wire = Wire(fake_ranks, name="test", hosts=hosts)
    ones = [1] * 1024
    wire.all_to_all(torch.zeros(1024), ones, ones, tag="ids", lane="ids").wait()
    assert wire.traffic["ids"] == 4 * 1023
    assert wire.between_hosts["ids"] == 4 * 1016
    assert wire.within_host().world_size == 8
    assert len(wire.gather_texts("same")) == 1024
