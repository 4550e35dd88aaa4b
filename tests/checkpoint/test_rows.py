"""Rows from elsewhere into tables in any layout, each to the id that it is for."""

import numpy as np
import pytest
import torch

from shardwise.checkpoint.rows import load_rows
from shardwise.checkpoint.safetensors import export_safetensors
from shardwise.checkpoint.source import blocks_here
from shardwise.sharding import column_wise, construct_module_sharding_plan, row_wise, shard
from shardwise.sharding.sliced import Block
from shardwise.tables import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    ModelDeltaTracker,
)

NAME = "embedding_bags.t.weight"
IDS = torch.tensor([3, -1, 9, 0, -1, 5])
ROWS = torch.arange(48, dtype=torch.float32).view(6, 8)
BUILDERS = {"rows": row_wise, "columns": lambda: column_wise([1, 0, 1, 0])}


def make(builder=None, world_size=1, data_type=DataType.FP32) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    model = EmbeddingBagCollection([EmbeddingBagConfig(10, 8, "t", data_type=data_type)])
    if builder is None:
        return model
    plan = construct_module_sharding_plan(
        model, {"t": BUILDERS[builder]()}, world_size=world_size, device_type="cpu"
    )
    return shard(model, plan)


def wanted(dtype=torch.float32) -> torch.Tensor:
    table = make().state_dict()[NAME].clone().to(dtype)
    table[[3, 9, 0, 5]] = ROWS[[0, 2, 3, 5]].to(dtype)
    return table


def is_of(here, whole) -> bool:
    return torch.equal(here.value, Block(here.offsets, here.value.shape, ()).of(whole))


def load(rank, world_size, builder, rows):
    model = make(builder, world_size)
    assert load_rows(model, NAME, rows, IDS) == 4
    blocks = blocks_here(model.state_dict()[NAME])
    return all(is_of(one, wanted()) for one in blocks)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("source", ["tensor", "rows.npy", "rows.safetensors"])
def test_each_rank_takes_the_rows_of_its_slices(ranks, tmp_path, builder, source):
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    export_safetensors({"rows": ROWS}, tmp_path / "rows.safetensors")
    assert all(ranks(2, load, builder, ROWS if source == "tensor" else tmp_path / source))


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_map_goes_into_a_plain_table_as_a_part_of_it(tmp_path, order):
    wide = np.concatenate([np.zeros((2, 8)), ROWS.numpy().astype(np.float64)])
    np.save(tmp_path / "rows.npy", np.asarray(wide, order=order))
    model = make()
    load_rows(model, NAME, np.load(tmp_path / "rows.npy", mmap_mode="r")[2:], IDS)
    assert torch.equal(model.state_dict()[NAME], wanted())


def test_rows_are_rounded_to_the_dtype_of_the_table():
    model = make(data_type=DataType.BF16)
    load_rows(model, NAME, ROWS + 0.123, torch.arange(6))
    assert torch.equal(model.state_dict()[NAME][:6], (ROWS + 0.123).bfloat16())


def test_rows_have_a_name_in_a_file_of_several(tmp_path):
    export_safetensors({"one": ROWS, "two": ROWS + 1}, tmp_path / "x.safetensors")
    model = make()
    load_rows(model, NAME, tmp_path / "x.safetensors", IDS, tensor="one")
    assert torch.equal(model.state_dict()[NAME], wanted())
    with pytest.raises(ValueError, match=r"x.safetensors: tensor=None, it has \['one', 'two'\]"):
        load_rows(model, NAME, tmp_path / "x.safetensors", IDS)


@pytest.mark.parametrize(
    ("rows", "ids", "reason"),
    [
        (ROWS[:, :4], IDS, r"rows must be floats \[N, 8\], got \[6, 4\]"),
        (ROWS.long(), IDS, r"rows must be floats \[N, 8\], got \[6, 8\] torch.int64"),
        (ROWS.flatten(), IDS, r"got \[48\]"),
        (ROWS, IDS[:5], r"one integer for each of 6 rows, got \[5\]"),
        (ROWS, IDS.clamp(min=0), r"id 0 is given twice, in ids at \[1, 3\]"),
        (ROWS, IDS + 1, r"ids\[2\] is 10, the table has ids 0 to 9"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(rows, ids, reason):
    model = make()
    with pytest.raises(ValueError, match=f"table '{NAME}': .*{reason}"):
        load_rows(model, NAME, rows, ids)
    assert torch.equal(model.state_dict()[NAME], make().state_dict()[NAME])


def test_bad_files_and_names_are_named(tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\1\0")
    with pytest.raises(ValueError, match=r"bad.npy: it is damaged"):
        load_rows(make(), NAME, tmp_path / "bad.npy", IDS)
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"code.npy: it is damaged or of another format"):
        load_rows(make(), NAME, tmp_path / "code.npy", IDS)
    with pytest.raises(FileNotFoundError, match=r"none.npy: there is no such file"):
        load_rows(make(), NAME, tmp_path / "none.npy", IDS)
    with pytest.raises(ValueError, match=rf"no table 't'; it has \['{NAME}'\]"):
        load_rows(make(), "t", ROWS, IDS)


def test_who_tracks_changes_hears_of_them():
    model = make()
    tracker = ModelDeltaTracker(model)
    load_rows(model, NAME, ROWS, IDS)
    (found,) = tracker.get_delta_ids().values()
    assert {0, 3, 5, 9} <= {*found.tolist()}
