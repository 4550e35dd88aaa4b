"""Which way the gradients of each slice go."""

from dataclasses import replace

import pytest
import torch

from shardwise.ops.lookup import RULES, Settings, Update
from shardwise.sharding.layout import lay_out
from shardwise.sharding.owners import Owners
from shardwise.sharding.routes import Ranks
from shardwise.sharding.wire import Wire
from tests.sharding.plain import SUM, by_rows, everywhere, grid, whole

TABLES = [
    whole("whole", 0),
    everywhere("all", 4),
    grid("cut", (0, 13), (0, 3, 8), [[0, 1]]),
    by_rows("relayed", 4),
]
RELAYED, EVERYWHERE, CUT, WHOLE = range(4)  # the order of the slices on rank 0


class NoWire(Wire):
    """Stands for four ranks; planning sends nothing."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 4


@pytest.fixture
def owners() -> Owners:
    numbers = torch.tensor([(0, t, SUM, 8) for t in range(4)])
    layout = lay_out(numbers, TABLES, Ranks(0, ((0, 1), (2, 3))))
    assert [cell.table for cell in layout.cells] == [3, 1, 2, 0]
    return Owners(layout, TABLES, NoWire(), "test")


def rule(name: str, tables: tuple[int, ...] = (0, 1, 2, 3), **options) -> Update:
    found = next(rule for rule in RULES if rule.name == name)
    return Update(
        rule=found,
        settings=Settings(),
        tables=tables,
        features=torch.empty(0, 4, dtype=torch.int64),
        states=[torch.full((1,), 10.0 * t + s) for t in tables for s in range(len(found.states))],
        steps=torch.zeros(len(tables), dtype=torch.int64),
        slots=torch.zeros(len(tables), 4, dtype=torch.int64),
        lr=torch.tensor(0.1),
        **options,
    )


def test_element_wise_rules_wait_for_replicas_only(owners):
    way = owners.plan_backward([rule("adam")], is_sparse=False)
    assert way.explicit == {EVERYWHERE}
    assert [update.tables for update in way.replicas.way.updates] == [(0,)]  # of the replicas
    assert way.last == ()


def test_rules_with_row_sums_wait_for_cut_rows_too(owners):
    way = owners.plan_backward([rule("lamb")], is_sparse=False)
    assert way.explicit == {EVERYWHERE, CUT}
    assert way.last[0].complete is not None


def test_parts_of_a_rule_share_its_states_and_steps(owners):
    update = rule("adam")
    way = owners.plan_backward([update], is_sparse=False)
    regions = [way.replicas, *way.regions.values()]
    parts = [*way.last, *(update for region in regions for update in region.way.updates)]
    for part in parts:
        part.steps.add_(1)
    assert update.steps.tolist() == [1, 1, 1, 1]
    states = {state.item() for part in parts for state in part.states}
    assert states == {state.item() for state in update.states}


def test_rules_at_the_step_leave_row_sparse_gradients(owners):
    way = owners.plan_backward([rule("lamb", in_backward=False)], is_sparse=False)
    assert (way.sparse, way.dense, way.last) == ((0, 1, 2, 3), (), ())


def test_slices_without_a_rule_keep_dense_gradients_or_sparse_ones_if_asked(owners):
    update = rule("adam", (RELAYED, WHOLE))
    assert owners.plan_backward([update], is_sparse=False).dense == (EVERYWHERE, CUT)
    assert owners.plan_backward([update], is_sparse=True).sparse == (EVERYWHERE, CUT)


def test_rules_run_at_the_step_add_up_rows_only_if_they_need_to(owners):
    assert owners.complete(rule("adam")).complete is None
    assert owners.complete(rule("row_wise_adagrad", (RELAYED, WHOLE))).complete is None
    assert owners.complete(rule("row_wise_adagrad")).complete is not None


def test_slice_has_one_rule(owners):
    update = rule("adam")
    with pytest.raises(ValueError, match="own one slice"):
        owners.plan_backward([update, replace(update, tables=(WHOLE,))], is_sparse=False)
