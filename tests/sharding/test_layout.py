"""The layout of messages: what is shared, who is asked, and that all ranks agree on it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.ops.route import ROWS
from shardwise.sharding.environment import equal_hosts
from shardwise.sharding.layout import Kind, lay_out
from shardwise.sharding.routes import Ranks
from tests.sharding.plain import MEAN, NONE, SUM, by_rows, everywhere, grid, whole

ONE_HOST, TWO_HOSTS = ((0, 1, 2, 3),), ((0, 1), (2, 3))


def lay(placements, features, rank=0, hosts=ONE_HOST):
    numbers = [(k, t, p, placements[t].num_columns) for k, t, p in features]
    return lay_out(torch.tensor(numbers), placements, Ranks(rank, hosts))


def test_column_blocks_on_one_rank_share_their_ids():
    table = grid("t", (0, 13), (0, 2, 4, 8), [[1, 2, 1]])
    hop = lay([table], [(0, 0, SUM)]).hop
    assert hop.routes.splits.shape[0] == 2
    assert hop.num_channels == 2
    assert hop.piece_widths.tolist() == [2, 4, 2]  # of rank 1 first


def test_tables_placed_alike_and_read_by_one_feature_share_its_ids():
    tables = [whole("a", 2), whole("b", 2), whole("c", 3)]
    hop = lay(tables, [(0, 0, SUM), (0, 1, MEAN), (1, 1, SUM), (0, 2, SUM)]).hop
    assert hop.routes.splits[:, 0].tolist() == [0, 1, 0]


def test_tables_that_are_everywhere_do_not_travel():
    layout = lay([everywhere("a", 4), whole("b", 0)], [(0, 0, SUM), (0, 1, SUM)])
    assert layout.is_everywhere == [True, False]
    assert layout.hop.routes.splits.shape[0] == 1
    assert lay([everywhere("a", 4)], [(0, 0, SUM)]).hop is None


def test_sequences_are_answered_by_rows():
    assert lay([whole("a", 2)], [(0, 0, NONE)], rank=2).hop.modes.tolist() == [ROWS]


@pytest.mark.parametrize(("rank", "asked"), [(0, 0), (1, 0), (2, 3), (3, 3)])
def test_source_asks_the_replica_that_is_nearest(rank, asked):
    table = grid("t", (0, 13), (0, 8), [[(0, 3)]])
    routes = lay([table], [(0, 0, SUM)], rank=rank, hosts=TWO_HOSTS).hop.routes
    (channel,) = routes.channels.tolist()
    assert routes.first_channel[asked] <= channel < routes.first_channel[asked + 1]


def test_replicas_elsewhere_share_the_asking():
    holders = (0, 1, 2)
    asked = {Ranks(rank, equal_hosts(12, 1)).choose(holders) for rank in range(3, 12)}
    assert asked == set(holders)


def test_relay_asks_the_rank_of_equal_number_on_each_host():
    layout = lay([by_rows("t", 4)], [(0, 0, SUM)], rank=1, hosts=TWO_HOSTS)
    starts = layout.hop.routes.first_channel
    ranks = [int(torch.searchsorted(starts, c, right=True)) - 1 for c in layout.hop.routes.channels]
    assert ranks == [1, 3]
    assert layout.relay.routes.splits.shape[0] == 1


@pytest.mark.parametrize("relay", [False, True])
def test_relay_is_for_several_ranks_of_one_host_only(relay):
    on_one_rank_each = grid("t", (0, 5, 13), (0, 8), [[0], [2]])
    assert not lay([on_one_rank_each], [(0, 0, SUM)], hosts=TWO_HOSTS).has_relay
    table = by_rows("t", 4, relay=relay)
    assert lay([table], [(0, 0, SUM)], hosts=TWO_HOSTS).has_relay == relay
    assert not lay([table], [(0, 0, SUM)]).has_relay
    assert not lay([table], [(0, 0, NONE)], hosts=TWO_HOSTS).has_relay


def test_slices_are_ordered_by_what_their_gradients_need():
    tables = [
        whole("whole", 1),
        everywhere("all", 4),
        grid("cut", (0, 13), (0, 3, 8), [[0, 1]]),
        grid("pair", (0, 13), (0, 8), [[(0, 2)]]),
        by_rows("relayed", 4),
    ]
    layout = lay(tables, [(0, t, SUM) for t in range(5)], hosts=TWO_HOSTS)
    expected = [Kind.RELAYED, Kind.EVERYWHERE, Kind.REPLICA, Kind.CUT, Kind.EMPTY]
    assert layout.kinds == expected
    assert [cell.table for cell in layout.cells] == [4, 1, 3, 2, 0]


CELLS = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=4)


@given(CELLS, st.sampled_from([ONE_HOST, TWO_HOSTS, ((0, 3), (1,), (2,))]), st.booleans())
def test_all_ranks_number_channels_and_pieces_alike(cells, hosts, answers_rows):
    cuts = tuple(3 * i for i in range(len(cells) + 1))
    answer = "rows" if answers_rows else "partials"
    rows = [[tuple(sorted(cell))] for cell in cells]
    table = grid("t", cuts, (0, 8), rows, answer=answer)
    layouts = [lay([table], [(0, 0, SUM), (1, 0, MEAN)], rank, hosts) for rank in range(4)]
    if layouts[0].hop is None:
        return
    for layout in layouts:
        for name in ("piece_channels", "piece_widths", "first_piece"):
            assert torch.equal(getattr(layout.hop, name), getattr(layouts[0].hop, name))
        assert torch.equal(layout.hop.routes.first_channel, layouts[0].hop.routes.first_channel)
        assert layout.hop.is_wide == layouts[0].hop.is_wide
    channels = [len(layout.hop.modes) for layout in layouts]
    assert channels == layouts[0].hop.routes.first_channel.diff().tolist()
    pieces = [len(layout.hop.owned) + len(layout.hop.relayed) for layout in layouts]
    assert pieces == layouts[0].hop.first_piece.diff().tolist()


def test_thousand_ranks_are_laid_out_whole():
    cuts = tuple(range(0, 10 * 1024 + 1, 10))
    tables = [grid(f"t{i}", cuts, (0, 8), [[r] for r in range(1024)]) for i in range(20)]
    hosts = equal_hosts(1024, 8)
    layout = lay(tables, [(i, i, SUM) for i in range(20)], rank=77, hosts=hosts)
    assert (
        layout.hop.num_channels == 20 * 1024
    )  # one per table and rank: each is a relay of its host
    assert layout.hop.routes.channels.numel() == 20 * 128
    assert layout.relay.num_channels == 20 * 8
    assert [c.part.first_row for c in layout.cells] == [770] * 20
    assert all(a <= b for a, b in pairwise(layout.hop.first_piece.tolist()))


def test_ids_are_wide_only_for_slices_past_two_to_the_31():
    big = 2**32
    assert lay([grid("t", (0, big), (0, 8), [[1]])], [(0, 0, SUM)]).hop.is_wide
    halves = grid("t", (0, big // 2, big), (0, 8), [[1], [2]])
    assert not lay([halves], [(0, 0, SUM)]).hop.is_wide
