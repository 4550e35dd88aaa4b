"""Parts of tables: every layout of a table starts with the same numbers."""

import pytest
import torch

from shardwise.tables.configs import DataType, EmbeddingConfig
from shardwise.tables.store import BLOCK_ROWS, Part, Store

ROWS = BLOCK_ROWS + 100


def filled(part=None, key=0, seed=5, **options) -> torch.Tensor:
    store = Store(EmbeddingConfig(ROWS, 6, "t", **options), key, part=part)
    store.fill(seed)
    return store.weight.detach()


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, ROWS), (0, 3)),
        ((0, 10), (2, 4)),
        ((BLOCK_ROWS - 5, 10), (0, 6)),
        ((BLOCK_ROWS + 7, 93), (5, 1)),
        ((50, 0), (0, 6)),
    ],
)
@pytest.mark.parametrize("init_fn", [None, torch.nn.init.normal_])
def test_a_part_starts_like_the_whole_table(rows, columns, init_fn):
    whole = filled(init_fn=init_fn)
    part = filled(Part(rows[0], rows[1], columns[0], columns[1]), init_fn=init_fn)
    own = whole[rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]]
    assert torch.equal(part, own)


def test_start_depends_on_seed_and_key():
    assert not torch.equal(filled(seed=1), filled(seed=2))
    assert not torch.equal(filled(key=1), filled(key=2))


def test_start_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    filled(init_fn=torch.nn.init.normal_)
    assert torch.equal(torch.rand(1), wanted)


def test_slot_names_the_place_in_the_whole_table():
    store = Store(EmbeddingConfig(100, 6, "t", DataType.BF16), 3, part=Part(20, 10, 2, 4))
    assert store.slot == (3, 20, 2, 6)
    assert store.weight.shape == (10, 4)
    assert store.weight.dtype == torch.bfloat16


def test_two_to_the_31_elements_are_described_on_meta():
    store = Store(EmbeddingConfig(2**31 + 5, 64, "t"), 0, torch.device("meta"))
    store.fill(0)
    assert store.weight.shape == (2**31 + 5, 64)
