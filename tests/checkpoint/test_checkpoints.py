"""What is saved is loaded: objects of every kind, in part, in another dtype, beside training."""

import json
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from shardwise.checkpoint import (
    Checkpoints,
    PerRank,
    RandomState,
    load_checkpoint,
    read_checkpoint,
    read_values,
    save_checkpoint,
)
from shardwise.checkpoint.files import write_part
from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import Adam, KeyedOptimizerWrapper, in_backward
from shardwise.tables import DataType, EmbeddingBagCollection, EmbeddingBagConfig


class Model(nn.Module):
    def __init__(self, seed: int, data_type=DataType.FP32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        tables = [EmbeddingBagConfig(10, 8, "a"), EmbeddingBagConfig(6, 4, "b")]
        for table in tables:
            table.data_type = data_type
        self.ebc = EmbeddingBagCollection(tables)
        self.over = nn.Linear(12, 3)


def make(seed: int, **options):
    model = Model(seed, **options)
    fused = in_backward(model, Adam, lr=0.1)
    dense = KeyedOptimizerWrapper(dict(model.over.named_parameters()), torch.optim.Adam)
    return model, fused, dense


def train(model, fused, dense) -> None:
    ids = KeyedJaggedTensor(
        ["a", "b"], torch.tensor([3, 9, 2, 5]), lengths=torch.tensor([2, 0, 1, 1])
    )
    model.over(model.ebc(ids).values().float()).square().sum().backward()
    fused.step()
    dense.step()
    dense.zero_grad()


def run_state(seed: int, num_steps: int):
    made = make(seed)
    for _ in range(num_steps):
        train(*made)
    return dict(zip(("model", "fused", "dense"), made, strict=True))


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    undisturbed = run_state(0, 2)
    save_checkpoint(tmp_path, 2, undisturbed)
    resumed = run_state(1, 0)
    load_checkpoint(tmp_path, resumed)
    for state in (undisturbed, resumed):
        train(*state.values())
    for name, one in undisturbed.items():
        assert same(one.state_dict(), resumed[name].state_dict())


def test_values_keep_their_types(tmp_path):
    values = {"a": (1, [2.5, None]), "b": {3: "x", "$odd": True}, "c": float("inf")}
    path = save_checkpoint(tmp_path, 2, {"values": values, "t": torch.ones(2)})
    assert load_checkpoint(tmp_path, {}) == {"values": values}
    assert read_values(path) == {"values": values}
    given = load_checkpoint(tmp_path, {"t": None})
    assert torch.equal(given["t"], torch.ones(2))


@pytest.mark.parametrize("value", [{1, 2}, print, torch.eye(2).to_sparse()])
def test_what_cannot_be_saved_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint: (tensor )?'run.odd' is"):
        save_checkpoint(tmp_path, 2, {"run": {"odd": value}})


def test_plain_torch_optimizer_is_restored(tmp_path):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    save_checkpoint(tmp_path, 2, {"optimizer": optimizer})
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    load_checkpoint(tmp_path, {"optimizer": other})
    assert same(other.state_dict(), optimizer.state_dict())


def test_random_numbers_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    save_checkpoint(tmp_path, 2, {"random": PerRank(RandomState())})
    drawn = [draw()]
    for _ in range(2):
        load_checkpoint(tmp_path, {"random": PerRank(RandomState())})
        drawn.append(draw())
    assert drawn[1] == drawn[2]
    assert drawn[0][1:] == drawn[1][1:]  # the checks of types while tests run draw Python's


# ---- in part, and in another dtype


@pytest.mark.parametrize(
    ("only", "loaded"),
    [
        ("model.ebc.embedding_bags.a.weight", ["ebc.embedding_bags.a.weight"]),
        ("model.over", ["over.weight", "over.bias"]),
        (["*.b.weight", "model.over.bias"], ["ebc.embedding_bags.b.weight", "over.bias"]),
    ],
)
def test_parts_are_loaded(tmp_path, only, loaded):
    save_checkpoint(tmp_path, 2, run_state(0, 1))
    model, before = Model(1), Model(1).state_dict()
    load_checkpoint(tmp_path, {"model": model}, only=only)
    wanted = Model(0).state_dict()
    changed = [name for name, one in model.state_dict().items() if not same(one, before[name])]
    assert sorted(changed) == sorted(loaded)
    assert wanted.keys() == before.keys()


def test_part_that_is_not_there_is_named(tmp_path):
    save_checkpoint(tmp_path, 2, run_state(0, 0))
    with pytest.raises(ValueError, match=r"only='model.other' is no tensor of it; it has"):
        load_checkpoint(tmp_path, {"model": Model(1)}, only="model.other")


@pytest.mark.parametrize("kind", [DataType.BF16, DataType.FP16])
def test_rows_are_converted_and_come_back(tmp_path, kind):
    narrow, wide, again = Model(0, kind), Model(1), Model(2, kind)
    save_checkpoint(tmp_path / "narrow", 1, {"model": narrow})
    load_checkpoint(tmp_path / "narrow", {"model": wide})
    for name, value in narrow.state_dict().items():
        assert torch.equal(wide.state_dict()[name], value.float())
    save_checkpoint(tmp_path / "wide", 1, {"model": wide})
    load_checkpoint(tmp_path / "wide", {"model": again})
    assert same(again.state_dict(), narrow.state_dict())


def test_rows_that_lose_bits_are_rounded_to_the_nearest(tmp_path):
    wide, narrow = Model(0), Model(1, DataType.BF16)
    save_checkpoint(tmp_path, 1, {"model": wide})
    load_checkpoint(tmp_path, {"model": narrow})
    name = "ebc.embedding_bags.a.weight"
    assert torch.equal(narrow.state_dict()[name], wide.state_dict()[name].bfloat16())


# ---- what does not fit


def other_rows() -> nn.Module:
    model = Model(1)
    model.over = nn.Linear(12, 4)
    return model


def other_kind() -> nn.Module:
    model = Model(1)
    model.over.weight = nn.Parameter(torch.ones(3, 12, dtype=torch.int32), requires_grad=False)
    return model


def other_names() -> nn.Module:
    model = Model(1)
    model.extra = nn.Linear(1, 1)
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (other_rows, r"'model.over.weight' is \[3, 12\] torch.float32 there and \[4, 12\]"),
        (other_kind, r"torch.float32 there and \[3, 12\] torch.int32 here"),
        (other_names, r"it lacks \['model.extra.bias', 'model.extra.weight'\] and has \[\] too"),
    ],
)
def test_mismatch_is_named_and_changes_nothing(tmp_path, make_model, message):
    save_checkpoint(tmp_path, 1, {"model": Model(0)})
    model = make_model()
    before = model.ebc.embedding_bags["a"].weight.clone()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, {"model": model})
    assert torch.equal(model.ebc.embedding_bags["a"].weight, before)


def test_what_both_have_is_loaded_on_request(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": Model(0)})
    model = other_names()
    load_checkpoint(tmp_path, {"model": model, "more": nn.Linear(1, 1)}, strict=False)
    assert same(model.over.state_dict(), Model(0).over.state_dict())


def test_missing_object_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": Model(0)})
    with pytest.raises(ValueError, match=r"there is no \['other'\] in it, only \['model'\]"):
        load_checkpoint(tmp_path, {"other": Model(1)})


# ---- beside training


def test_save_in_the_background_holds_what_was_there(tmp_path, monkeypatch):
    state, run, has_trained = run_state(0, 1), Checkpoints(tmp_path), threading.Event()

    def write_later(*args) -> None:
        assert has_trained.wait(60)
        write_part(*args)

    monkeypatch.setattr("shardwise.checkpoint.checkpoints.write_part", write_later)
    for step in (1, 2):
        wanted = {f"model.{n}": t.clone() for n, t in state["model"].state_dict().items()}
        has_trained.clear()
        pending = run.save(step, state, wait=False)
        train(*state.values())
        assert not pending.is_done
        has_trained.set()
        assert pending.result() == tmp_path / f"step_{step}"
        assert same(read_checkpoint(tmp_path, "model"), wanted)


def test_memory_of_saves_in_the_background_is_used_again(tmp_path):
    state, run = run_state(0, 0), Checkpoints(tmp_path)
    run.save(1, state, wait=False).result()
    before = {at: copy.data_ptr() for at, copy in run._copies.items()}
    run.save(2, state, wait=False).result()
    assert {at: copy.data_ptr() for at, copy in run._copies.items()} == before


# ---- the files


def test_torch_reads_the_files_as_its_own(tmp_path):
    tensors = {
        "a": torch.randn(5, 3, dtype=torch.bfloat16),
        "b": torch.tensor(3),
        "c": torch.randn(4, 3).T,
        "d": torch.ones(2_000_000),  # of several pieces
        "e": torch.tensor([True, False]),
    }
    path = save_checkpoint(tmp_path, 1, {"x": tensors})
    into = {f"x.{name}": torch.zeros_like(one) for name, one in tensors.items()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(into, checkpoint_id=path)
    assert all(torch.equal(into[f"x.{name}"], one) for name, one in tensors.items())
    assert same({f"x.{name}": one for name, one in tensors.items()}, read_checkpoint(tmp_path))


def test_values_are_json_that_anyone_can_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"epoch": 1})
    assert json.loads((path / "manifest.json").read_text().split("\n")[1])["state"] == {"epoch": 1}
