"""Bytes on the wire: the closed forms of docs/sharding.md, and never more than TorchRec sends.

All tables have 64 columns; ids are uniform. TorchRec sends 8 bytes per id and 4 per length, and for
row slices one vector per bag and slice each way.
"""

import pytest
import torch

from shardwise.ops.lookup import Ids, Pooling
from shardwise.sharding.environment import equal_hosts
from shardwise.sharding.exchange import Exchange
from shardwise.sharding.wire import Wire
from tests.sharding.plain import grid

ROWS, WIDTH, BAGS, RANKS = 100_000, 64, 512, 4


def table(kind: str, answer: str = "partials"):
    quarters = [ROWS * r // RANKS for r in range(RANKS + 1)]
    return {
        "table": lambda: grid("t", (0, ROWS), (0, WIDTH), [[1]], answer=answer),
        "column": lambda: grid("t", (0, ROWS), (0, 32, WIDTH), [[1, 2]], answer=answer),
        "row": lambda: grid("t", quarters, (0, WIDTH), [[r] for r in range(RANKS)], answer=answer),
        "host": lambda: grid("t", quarters[::2], (0, WIDTH), [[2], [3]], answer=answer),
    }[kind]()


def count(rank: int, ranks: int, kind: str, pooling: int, num_hosts: int, answer: str):
    """Bytes of one training step of all ranks, by tag: sent, and sent to another host."""
    wire = Wire(
        torch.distributed.group.WORLD, name="test", hosts=equal_hosts(ranks, ranks // num_hosts)
    )
    features = torch.tensor([(0, 0, int(Pooling.SUM), WIDTH)])
    exchange = Exchange(features, [table(kind, answer)], wire)
    parts = [cell.part for cell in exchange.cells]
    slices = [torch.zeros(p.num_rows, p.num_columns, requires_grad=True) for p in parts]
    ids = torch.randint(ROWS, (BAGS * pooling,), generator=torch.Generator().manual_seed(rank))
    offsets, nothing = torch.arange(BAGS + 1) * pooling, torch.empty(0)
    call = Ids(ids, offsets, nothing, False, features, nothing.long(), True, 0)
    way = exchange.plan_backward([], is_sparse=True)
    wire.reset()
    out = exchange(call, (BAGS, WIDTH), slices, way, lambda error: error)
    out.sum().backward()
    by_kind = [
        {tag.split(" of ")[0]: size for tag, size in total.items() if "relay" not in tag}
        for total in (wire.traffic, wire.between_hosts)
    ]
    return by_kind, exchange.traffic()["t"]


def total(ranks, kind: str, pooling: int, num_hosts: int = 1, answer: str = "partials"):
    every = ranks(RANKS, count, kind, pooling, num_hosts, answer)
    sums = [
        {tag: sum(one[0][far].get(tag, 0) for one in every) for tag in every[0][0][far]}
        for far in (0, 1)
    ]
    return *sums, [sum(one[1][k] for one in every) for k in (0, 1)]


def non_empty(pooling: int, slices: int) -> float:
    """Expected slices with an id of a bag."""
    return slices * (1 - (1 - 1 / slices) ** pooling)


def torchrec(kind: str, pooling: int) -> tuple[float, float]:
    """Bytes of ids and lengths, and of vectors one way."""
    ids = 8 * pooling * BAGS
    lengths, vectors = 4 * BAGS, 4 * WIDTH * BAGS
    if kind == "row":
        return RANKS * (3 / 4 * ids + 3 * lengths), RANKS * 3 * vectors
    copies = 2 if kind == "column" else 1
    return 3 * copies * (ids + lengths), 3 * vectors


@pytest.mark.parametrize("pooling", [1, 3, 20])
@pytest.mark.parametrize("kind", ["table", "column", "row"])
def test_bytes_are_those_of_the_closed_forms_and_at_most_torchrecs(ranks, kind, pooling):
    sent, _, by_table = total(ranks, kind, pooling)
    messages = 3 * BAGS * {"table": 1, "column": 2, "row": non_empty(pooling, RANKS)}[kind]
    is_one = pooling == 1
    per_bag = 4 * (3 * pooling if kind == "row" else 3 * pooling * (1 + (kind == "column")))
    ids = BAGS * per_bag + 4 * messages * (not is_one)
    vectors = messages * 4 * WIDTH / (1 + (kind == "column"))
    assert sent["ids"] == pytest.approx(ids, rel=0.05)
    assert sent["answers"] == sent["gradients"] == pytest.approx(vectors, rel=0.05)
    assert by_table[1] == sent["answers"]
    assert by_table[0] == pytest.approx(sent["ids"], rel=0.01)
    peer_ids, peer_vectors = torchrec(kind, pooling)
    assert sent["ids"] + sent["counts"] <= peer_ids
    assert sent["answers"] <= peer_vectors


def test_row_slices_of_single_ids_send_less_than_half_of_torchrec(ranks):
    sent, _, _ = total(ranks, "row", 1)
    ids, vectors = torchrec("row", 1)
    assert sum(sent.values()) < 0.5 * (ids + 2 * vectors)


def test_rows_send_each_id_and_its_vector_once(ranks):
    sent, _, _ = total(ranks, "table", 20, answer="rows")
    distinct = ROWS * (1 - (1 - 1 / ROWS) ** (20 * BAGS))
    assert sent["ids"] == pytest.approx(3 * 4 * distinct, rel=0.05)
    assert sent["answers"] == pytest.approx(3 * 4 * WIDTH * distinct, rel=0.05)


@pytest.mark.parametrize(("kind", "hosts_read"), [("row", 2), ("host", 1)])
def test_relay_sends_one_vector_per_bag_and_host(ranks, kind, hosts_read):
    _, far, _ = total(ranks, kind, 8, num_hosts=2)
    bags = 2 * BAGS * hosts_read  # both ranks of a host ask each other host that holds rows
    share = 1 - 0.5**8 if kind == "row" else 1
    assert far["answers"] == far["gradients"] <= bags * 4 * WIDTH
    assert far["answers"] == pytest.approx(bags * share * 4 * WIDTH, rel=0.05)
