"""What any layout has saved, any other loads: weights and states of every kind of optimizer."""

import random

import pytest
import torch
from torch import nn

from shardwise.checkpoint import (
    Checkpoints,
    PerRank,
    RandomState,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from shardwise.optim import (
    Adam,
    CombinedOptimizer,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    in_backward,
)
from shardwise.sharding import (
    ShardingPlan,
    Slice,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    shard,
    slices,
    table_wise,
)
from shardwise.sharding.sliced import SlicedTensor
from shardwise.tables import DataType, EmbeddingBagCollection, EmbeddingBagConfig
from tests.checkpoint.test_folder import limit_files

ROWS, WIDTH = 13, 8
KINDS = ("fused", "step", "adam", "rowwise")


def uneven(name: str, world_size: int):
    """Overlapping replicas, an empty slice, blocks of odd widths."""
    last = world_size - 1
    return slices(
        [
            Slice(name, (0, 4), (0, 3), tuple(range(world_size))),
            Slice(name, (0, 4), (3, 8), (last,)),
            Slice(name, (4, 4), (0, 8), (0,)),
            Slice(name, (4, 13), (0, 5), tuple(sorted({0, last}))),
            Slice(name, (4, 13), (5, 8), (last // 2,)),
        ]
    )


PLANS = {
    "data_parallel": lambda name, world_size: data_parallel(),
    "table_wise": lambda name, world_size: table_wise(world_size - 1),
    "row_wise": lambda name, world_size: row_wise(),
    "column_wise": lambda name, world_size: column_wise([world_size - 1, 0]),
    "grid": lambda name, world_size: grid_shard([0, world_size // 2 - (world_size > 1)]),
    "uneven": uneven,
}


def make(plan: str | None, world_size: int = 1):
    """A model of four collections, one per kind of optimizer, and a dense layer; with optimizer."""
    torch.manual_seed(5)
    model = nn.Module()
    for kind in KINDS:
        tables = [
            EmbeddingBagConfig(ROWS, WIDTH, f"{kind}{dtype.name}", data_type=dtype)
            for dtype in (DataType.FP32, DataType.BF16)
        ]
        model.add_module(kind, EmbeddingBagCollection(tables))
    model.dense = nn.Linear(3, 2)
    if plan is not None:
        plans = {
            kind: construct_module_sharding_plan(
                collection,
                {c.name: PLANS[plan](c.name, world_size) for c in collection._configs},
                local_size=max(1, world_size // 2),
                world_size=world_size,
                device_type="cpu",
            )
            for kind, collection in model.named_children()
            if kind in KINDS
        }
        shard(model, ShardingPlan(plans))
    dense = {**dict(model.adam.named_parameters("adam")), **dict(model.dense.named_parameters())}
    parts = [
        ("fused", in_backward(model.fused, Adam, lr=0.1)),
        ("step", in_backward(model.step, RowWiseAdagrad, lr=0.1, when="step")),
        KeyedOptimizerWrapper(dense, torch.optim.Adam),
        KeyedOptimizerWrapper(
            dict(model.rowwise.named_parameters("rowwise")), lambda p: RowWiseAdagrad(p, lr=0.1)
        ),
    ]
    return {"model": model, "optimizer": CombinedOptimizer(parts)}


def tensors(state) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": one for name, one in state["model"].state_dict().items()}
    for parameter, values in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer.state.{parameter}.{kind}": one for kind, one in values.items()}
    return found


def known(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A value of the whole that depends on the name only."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if not tensor.dtype.is_floating_point or tensor.dim() == 0:
        return torch.randint(2, 100, tensor.shape, generator=generator).to(tensor.dtype)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def save_all(rank, world_size, folder, plans):
    for plan in plans:
        state = make(plan, world_size)
        state["optimizer"].init_state()
        with torch.no_grad():
            for name, tensor in tensors(state).items():
                tensor.copy_(known(name, tensor))
        state["optimizer"].load_state_dict(state["optimizer"].state_dict())  # to further parts
        save_checkpoint(folder / plan / str(world_size), 1, state)


def load_all(rank, world_size, pairs):
    """Load each (folder, plan); name what differs."""
    wrong = []
    for folder, plan in pairs:
        state = make(plan, world_size)
        load_checkpoint(folder, state)
        for name, tensor in tensors(state).items():
            whole = tensor.full() if isinstance(tensor, SlicedTensor) else tensor
            if not torch.equal(whole, known(name, whole)):
                wrong.append(f"{folder.parent.name} {folder.name} in {plan} {world_size}: {name}")
        for part in state["optimizer"].params:
            if part.startswith(("adam", "rowwise")):
                steps = state["optimizer"].state[state["optimizer"].params[part]]["step"]
                name = ".".join([*part.split(".")[:3], "weight"])
                if not torch.equal(steps, known(f"optimizer.state.{name}.step", steps)):
                    wrong.append(f"step of {part}")
    return wrong


def check(ranks, folder, saves, loads) -> None:
    for world_size in {w for _, w in saves}:
        ranks(world_size, save_all, folder, [p for p, w in saves if w == world_size])
    for world_size in {w for *_, w in loads}:
        pairs = [(folder / p / str(n), plan) for (p, n), plan, w in loads if w == world_size]
        for wrong in ranks(world_size, load_all, pairs, timeout_s=120.0):
            assert wrong == []


def test_layouts_load_one_another(ranks, tmp_path):
    saves = [("uneven", 2), ("row_wise", 1)]
    loads = [(saves[0], "row_wise", 4), (saves[0], "column_wise", 1), (saves[1], "uneven", 4)]
    check(ranks, tmp_path, saves, loads)


@pytest.mark.slow
def test_every_layout_is_loaded_by_four_others(ranks, tmp_path):
    saves = [(plan, world_size) for plan in PLANS for world_size in (1, 2, 4)]
    draw = random.Random(6)
    loads = [
        (save, *other)
        for save in saves
        for other in draw.sample([one for one in saves if one != save], 4)
    ]
    assert len(loads) == 72
    check(ranks, tmp_path, saves, loads)


def test_plain_model_reads_what_ranks_have_saved(ranks, tmp_path):
    ranks(2, save_all, tmp_path, ["column_wise"])
    state = make(None)
    load_checkpoint(tmp_path / "column_wise" / "2", state)
    read = read_checkpoint(tmp_path / "column_wise" / "2")
    for name, tensor in tensors(state).items():
        assert torch.equal(tensor, known(name, tensor))
        assert torch.equal(read[name], tensor)


def load_what_plain_saved(rank, world_size, folder):
    state = make("uneven", world_size)
    name = "model.adam.embedding_bags.adamFP32.weight"
    before = {n: t.full() for n, t in tensors(state).items() if isinstance(t, SlicedTensor)}
    load_checkpoint(folder, state, only=name)
    after = {n: t.full() for n, t in tensors(state).items() if n in before}
    changed = [n for n, tensor in after.items() if not torch.equal(tensor, before[n])]
    assert changed == [name]
    assert torch.equal(after[name], read_checkpoint(folder, name)[name])


def test_one_table_of_a_plain_model_is_read_into_slices(ranks, tmp_path):
    state = make(None)
    with torch.no_grad():
        for name, tensor in tensors(state).items():
            tensor.copy_(known(name, tensor))
    save_checkpoint(tmp_path, 1, state)
    ranks(2, load_what_plain_saved, tmp_path)


# ---- many ranks, one folder


def draw_and_save(rank, world_size, folder):
    torch.manual_seed(rank)
    run = Checkpoints(folder)
    state = {"random": PerRank(RandomState()), "own": PerRank({"rank": rank}), "same": 7}
    run.save(1, state, wait=False)
    drawn = torch.rand(1).item()
    run.wait()
    got = run.load({"random": state["random"], "own": PerRank(None)})
    assert torch.rand(1).item() == drawn
    assert got == {"same": 7, f"own.rank{rank}": {"rank": rank}}
    return drawn


def test_what_is_each_ranks_own_comes_back_to_it(ranks, tmp_path):
    drawn = ranks(2, draw_and_save, tmp_path)
    assert drawn[0] != drawn[1]


def fail_on_one_rank(rank, world_size, folder):
    run = Checkpoints(folder)
    run.save(1, {"t": torch.ones(2)})
    state = {"t": torch.ones(2), "odd": PerRank({1} if rank else 1)}
    with pytest.raises(TypeError, match=r"rank 1: checkpoint: 'odd.rank1' is of type set"):
        run.save(2, state)
    if rank == 0:
        (folder / "step_1" / "__0_0.distcp").unlink()
    with pytest.raises(OSError, match=r"file __0_0.distcp is missing"):
        run.load({"t": torch.ones(2)})
    plain = torch.optim.SGD(make("row_wise", world_size)["model"].parameters())
    with pytest.raises(ValueError, match="'o', a SGD, has slices of tables and does not name them"):
        run.save(3, {"o": plain})


def test_what_fails_on_one_rank_is_raised_on_all(ranks, tmp_path):
    ranks(2, fail_on_one_rank, tmp_path)


def fill_the_disk(rank, world_size, folder, wait):
    run = Checkpoints(folder)
    run.save(1, {"t": torch.ones(2)})
    if rank == 1:
        limit_files(2**12)
    try:
        with pytest.raises(OSError, match=r"step_2 could not be written: .*File too large"):
            run.save(2, {"big": PerRank(torch.ones(2**12))}, wait=wait).result()
    finally:
        limit_files(-1)
    assert torch.equal(run.load({"t": None})["t"], torch.ones(2))


@pytest.mark.parametrize("wait", [True, False])
def test_full_disk_of_one_rank_is_told_to_all(ranks, tmp_path, wait):
    ranks(2, fill_the_disk, tmp_path, wait)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
