"""Replicas apply the gradients of all ranks alike, whichever way they are sent."""

import pytest
import torch

from shardwise.ops.lookup import row_grads
from shardwise.sharding.layout import Cell
from shardwise.sharding.placement import Placement
from shardwise.sharding.rows import Replicas
from shardwise.sharding.wire import Wire
from shardwise.tables.store import Part
from tests.sharding.plain import NONE, SUM, Case, differences, everywhere, grid

HOT = grid("hot", (0, 4, 13), (0, 8), [[(0, 1, 3)], [2]])
PAIRS = grid("pairs", (0, 13), (0, 8), [[(0, 2)]])
OTHERS = grid("others", (0, 7, 13), (0, 3, 8), [[(1, 3), 0], [(0, 1, 2, 3), 0]])


@pytest.mark.parametrize("when", ["backward", "step", "dense", "sparse"])
@pytest.mark.parametrize("pooling", [SUM, NONE])
def test_replicas_train_as_the_plain_lookup(ranks, when, pooling):
    tables = (everywhere("all", 4), HOT, PAIRS, OTHERS)
    features = tuple((t % 2, t, pooling) for t in range(4))
    found = differences(ranks, 4, Case(tables, features, rule="adagrad", when=when))
    assert max(found.outputs, found.rows, found.states) < 1e-6


def merge(rank: int, ranks: int, rows: range):
    """Merge gradients of a replicated table of 10 rows; give the sums, and the bytes sent."""
    wire = Wire(torch.distributed.group.WORLD, name="test")
    holders = tuple(range(ranks))
    placement = Placement("t", (0, 10), (0, 4), ((holders,),))
    cell = Cell(0, Part(0, 10, 0, 4), holders, (0, 0))
    replicas = Replicas([cell], [placement], wire, "test")
    own = torch.arange(10)[rows.start + rank : rows.stop + rank]
    grads = torch.full((len(own), 4), 10.0**rank)
    wire.reset()
    table = torch.zeros(10, 4)
    merged = replicas.merge({0: (own, grads)}, [table])
    sent = sum(size for tag, size in wire.traffic.items() if "replicas" in tag)
    return row_grads(*merged, [table])[0], sent


def test_two_holders_tell_each_other_their_rows(ranks):
    for (rows, grads), sent in ranks(2, merge, range(2)):
        assert rows.tolist() == [0, 1, 2]
        assert grads[:, 0].tolist() == [1, 11, 10]
        assert sent == 4 + 2 * (4 + 4 * 4)  # a count; per row its number and gradient


def test_more_holders_send_each_row_to_one_of_them_and_sums_to_all(ranks):
    found = ranks(4, merge, range(3, 6))  # they add up rows 0 and 1, 2 to 4, 5 and 6, 7 to 9
    for (rows, grads), _ in found:
        assert rows.tolist() == [3, 4, 5, 6, 7, 8]
        assert grads[:, 0].tolist() == [1, 11, 111, 1110, 1100, 1000]
    out, sums = [3, 2, 1, 1], [0, 2, 2, 2]  # rows that go elsewhere, and rows whose sums are here
    row = 4 + 4 * 4
    counts = 2 * 3 * 4
    assert [sent for _, sent in found] == [
        counts + row * (gone + 3 * here) for gone, here in zip(out, sums, strict=True)
    ]
