"""Folders that TorchRec 1.8.0 wrote, by write_torchrec_fixtures.py, and damaged ones."""

import io
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardwise.checkpoint import load_torchrec_checkpoint
from shardwise.checkpoint.source import blocks_here, fill
from shardwise.checkpoint.torch_folder import TorchFolder
from shardwise.optim import SGD, Adam, RowWiseAdagrad, in_backward
from shardwise.sharding import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    dense_parallel,
    grid_shard,
    row_wise,
    shard,
    table_wise,
)
from shardwise.sharding.sliced import Block
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)

FIXTURES = Path(__file__).parent / "torchrec"
CASES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
LAYOUTS = {
    "rows": lambda ranks: {"a": row_wise(), "b": row_wise()},
    "columns": lambda ranks: {"a": column_wise([ranks - 1, 0]), "b": column_wise([0, 0, 0, 0])},
    "whole": lambda ranks: {"a": table_wise(ranks - 1), "b": data_parallel()},
    "grid": lambda ranks: {"a": grid_shard([0, 0]), "b": table_wise(0)},
}


class Model(torch.nn.Module):
    def __init__(self, sizes: list[tuple[int, int]], is_sequence: bool) -> None:
        super().__init__()
        make = EmbeddingConfig if is_sequence else EmbeddingBagConfig
        configs = [make(*size, name) for size, name in zip(sizes, "ab", strict=True)]
        collection = EmbeddingCollection if is_sequence else EmbeddingBagCollection
        self.sparse = collection(tables=configs)
        self.over = torch.nn.Linear(3, 1)


def make(case: str, world_size=0, layout="rows", optimizer_class=None):
    """A model of the case's tables with its optimizer."""
    with np.load(FIXTURES / f"{case}.npz") as kept:
        sizes = [kept[n].shape for n in sorted(kept) if n.endswith(".weight") and "sparse" in n]
    torch.manual_seed(3)
    model = Model(sizes, "sequence" in case)
    kinds = {"adagrad": torch.optim.Adagrad, "sequence": torch.optim.Adagrad, "sgd": SGD}
    kind = optimizer_class or kinds.get(case.rpartition("_")[2], RowWiseAdagrad)
    if world_size:
        plan = construct_module_sharding_plan(
            model.sparse,
            LAYOUTS[layout](world_size),
            world_size=world_size,
            local_size=world_size,
            device_type="cpu",
        )
        shard(model.sparse, plan)
    return model, in_backward(model, kind, lr=0.1)


def wanted(case: str) -> dict[str, torch.Tensor]:
    """What TorchRec had: whole tables, and states by `<parameter>//<table>.<state>`."""
    with np.load(FIXTURES / f"{case}.npz") as kept:
        found = {name: torch.from_numpy(kept[name]) for name in kept}
    for name in [name for name in found if name.endswith("/blocks")]:
        blocks, widths = found.pop(name).double(), found.pop(name.replace("blocks", "widths"))
        mean = (blocks * widths[:, None]).sum(0) / widths.sum()
        found[name.removesuffix("/blocks")] = mean.float()
    return found


def differences(case, model, optimizer) -> list[str]:
    here = dict(model.state_dict())
    for parameter, states in optimizer.state_dict()["state"].items():
        table = parameter.split(".")[-2]
        if "sum" in states:
            here[f"{parameter}//{table}.momentum1"] = states["sum"]
    there = wanted(case)
    assert here.keys() == there.keys()
    return [
        name
        for name, value in here.items()
        for one in blocks_here(value)
        if not torch.equal(one.value, Block(one.offsets, one.value.shape, ()).of(there[name]))
    ]


@pytest.mark.parametrize("case", CASES)
def test_folder_loads_exactly(case):
    model, optimizer = make(case)
    load_torchrec_checkpoint(FIXTURES / case, model, optimizer)
    assert differences(case, model, optimizer) == []


def load(rank, world_size, case, layout):
    model, optimizer = make(case, world_size, layout)
    wrapped = dense_parallel(model) if layout == "columns" else model
    load_torchrec_checkpoint(FIXTURES / case, wrapped, optimizer)
    return differences(case, model, optimizer)


@pytest.mark.parametrize(
    ("case", "world_size", "layout"),
    [
        ("table_wise", 2, "rows"),
        ("row_wise", 4, "columns"),
        ("column_wise", 1, "grid"),
        ("column_wise_merged", 4, "rows"),
        ("column_wise_dtensor", 2, "columns"),
        ("grid_shard", 2, "rows"),
        ("row_wise_sequence", 2, "whole"),
        ("column_wise_adagrad", 2, "grid"),
    ],
)
def test_folder_loads_exactly_into_slices(ranks, case, world_size, layout):
    for found in ranks(world_size, load, case, layout):
        assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_folder_loads_exactly_into_any_layout(ranks, case, world_size, layout):
    for found in ranks(world_size, load, case, layout):
        assert found == []


def save(state, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)


def test_states_of_adam_have_the_names_of_fbgemm(tmp_path):
    """TorchRec has no Adam on CPU, so this has its names (`momentum1` first) without its files."""
    model, optimizer = make("row_wise", optimizer_class=Adam)
    states = {
        f"sparse.embedding_bags.{name}.weight": {
            f"{name}.momentum1": torch.randn(rows, columns),
            f"{name}.exp_avg_sq": torch.rand(rows, columns),
        }
        for name, rows, columns in [("a", 11, 8), ("b", 7, 16)]
    }
    save({"model": model.state_dict(), "optimizer": {"state": states}}, tmp_path)
    with pytest.raises(ValueError, match=r"TorchRec saves no number of steps.*give steps="):
        load_torchrec_checkpoint(tmp_path, model, optimizer)
    load_torchrec_checkpoint(tmp_path, model, optimizer, steps=5)
    for parameter, state in optimizer.state_dict()["state"].items():
        first, second = states[parameter].values()
        assert torch.equal(state["exp_avg"], first)
        assert torch.equal(state["exp_avg_sq"], second)
        assert state["step"] == 5


def test_state_dict_of_a_model_itself_has_no_key(tmp_path):
    save(make("row_wise")[0].state_dict(), tmp_path)
    model = Model([(11, 8), (7, 16)], is_sequence=False)
    load_torchrec_checkpoint(tmp_path, model, model_key="")
    assert torch.equal(model.over.weight, make("row_wise")[0].over.weight)


def test_state_of_another_model_is_refused_and_changes_nothing():
    model = Model([(11, 8), (8, 16)], is_sequence=False)
    before = model.over.bias.clone()
    with pytest.raises(ValueError, match=r"is \[7, 16\] torch.float32 there and \[8, 16\]"):
        load_torchrec_checkpoint(FIXTURES / "row_wise", model)
    with pytest.raises(ValueError, match=r"it lacks \['model.sparse.embedding_bags.a.weight', "):
        load_torchrec_checkpoint(FIXTURES / "row_wise_sequence", model)
    with pytest.raises(ValueError, match=r"other keys.*its keys are \['model', 'optimizer'\]"):
        load_torchrec_checkpoint(FIXTURES / "row_wise", model, model_key="app", strict=False)
    assert torch.equal(model.over.bias, before)


def test_what_both_have_can_be_loaded(tmp_path):
    state = make("row_wise")[0].state_dict()
    del state["over.weight"]
    save({"model": state | {"more": torch.zeros(1)}}, tmp_path)
    model = Model([(11, 8), (7, 16)], is_sequence=False)
    with pytest.raises(ValueError, match=r"lacks \['model.over.weight'\] and has \['model.more'\]"):
        load_torchrec_checkpoint(tmp_path, model)
    load_torchrec_checkpoint(tmp_path, model, strict=False)
    assert torch.equal(model.over.bias, state["over.bias"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def flip(data: bytes) -> bytes:
    """Change a bit of the first table."""
    at = data.index(wanted("table_wise")["sparse.embedding_bags.a.weight"].numpy().tobytes())
    return data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :]


FILE, METADATA = "__0_0.distcp", ".metadata"
DAMAGES = {
    "flipped": (FILE, flip, r"__0_0.distcp is damaged in tensor 'model.sparse.*Bad CRC-32"),
    "cut": (FILE, lambda d: d[:-100], "__0_0.distcp has .* bytes, a tensor lies at"),
    "of zeros": (FILE, lambda d: bytes(len(d)), "__0_0.distcp is damaged in tensor"),
    "missing": (FILE, None, "file __0_0.distcp is missing"),
    "no description": (METADATA, None, "file .metadata is missing; name a folder that"),
    "cut description": (METADATA, lambda d: d[:100], ".metadata is damaged"),
    "another pickle": (METADATA, lambda d: pickle.dumps([1, 2]), ".metadata is damaged"),
    "code": (METADATA, lambda d: pickle.dumps(Evil()), "it names posix.mkdir, which no descr"),
    "elsewhere": (
        METADATA,
        lambda d: d.replace(b"__0_0.distcp", b"../../passwd"),
        "file ../../passwd is missing",
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_folder_is_refused_and_runs_nothing(tmp_path, monkeypatch, how):
    file, change, reason = DAMAGES[how]
    folder = tmp_path / "saved"
    shutil.copytree(FIXTURES / "table_wise", folder)
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if change is not None:
        (folder / file).write_bytes(change(data))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"checkpoint .*saved: .*{reason}"):
        load_torchrec_checkpoint(folder, *make("table_wise"))
    assert not (tmp_path / "ran").exists()


def test_code_in_a_block_is_refused(tmp_path, monkeypatch):
    state = {"x": torch.zeros(3)}
    save(state, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    saved = io.BytesIO()
    torch.save(Evil(), saved)
    size = file.stat().st_size
    assert len(saved.getvalue()) <= size
    file.write_bytes(saved.getvalue().ljust(size, b"\0"))
    monkeypatch.chdir(tmp_path)
    folder = TorchFolder(tmp_path)
    with pytest.raises(ValueError, match=r"it names posix.mkdir, which no tensor needs"):
        fill(folder, "x", torch.zeros(3))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3),
        torch.arange(6).view(2, 3).t(),
        torch.arange(10.0)[4:7],
        torch.nn.Parameter(torch.ones(2)),
        torch.zeros(0, 3),
        torch.ones(3, 2, dtype=torch.bfloat16),
    ],
    ids=["scalar", "transposed", "view", "parameter", "empty", "bf16"],
)
def test_every_kind_of_tensor_is_read(tmp_path, value):
    save({"x": value}, tmp_path)
    found = torch.full(value.shape, -1, dtype=value.dtype)
    fill(TorchFolder(tmp_path), "x", found)
    assert torch.equal(found, value)
