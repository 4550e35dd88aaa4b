"""Replicas apply the gradients of all ranks alike, whichever way they are sent."""

import pytest
import torch

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


def merge(rank: int, ranks: int, touched: int):
    """Merge gradients of a replicated table of 10 rows; give what came and the bytes sent."""
    wire = Wire(torch.distributed.group.WORLD, name="test")
    holders = tuple(range(ranks))
    placement = Placement("t", (0, 10), (0, 4), ((holders,),))
    cell = Cell(0, Part(0, 10, 0, 4), holders, (0, 0))
    replicas = Replicas([cell], [placement], wire, "test")
    rows = torch.arange(touched) if touched == 10 else torch.arange(touched) + rank
    grads = torch.full((touched, 4), 10.0**rank)
    wire.reset()
    merged = replicas.merge({0: (rows, grads)}, [torch.zeros(10, 4)])
    sent = sum(size for tag, size in wire.traffic.items() if "replicas" in tag)
    return merged[0], sent


def test_few_rows_are_sent_as_rows(ranks):
    for (rows, grads), sent in ranks(2, merge, 2):
        assert rows.tolist() == [0, 1, 2]
        assert grads[:, 0].tolist() == [1, 11, 10]
        assert sent == 8 + 2 * (4 + 4 * 4)  # a count; per row its number and gradient


def test_many_rows_are_sent_as_dense_gradients(ranks):
    for (rows, grads), sent in ranks(2, merge, 10):
        assert rows.tolist() == list(range(10))
        assert grads[:, 0].tolist() == [11] * 10
        assert sent == 8 + 2 * 5 * (4 * 4 + 4)  # half of the rows out, half of the sums back


def test_rows_without_gradient_stay_untouched_in_dense_sums(ranks):
    for (rows, _), _ in ranks(2, merge, 8):
        assert rows.tolist() == list(range(9))
