"""State of sharded models: the keys and shapes of the plain one, in any layout."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as checkpoint

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import Adam, CombinedOptimizer, RowWiseAdagrad, WarmupOptimizer, in_backward
from shardwise.optim.warmup import WarmupPolicy, WarmupStage
from shardwise.sharding import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    shard,
    table_wise,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

CONFIGS = [
    EmbeddingBagConfig(10, 8, "a"),
    EmbeddingBagConfig(6, 4, "b"),
    EmbeddingBagConfig(5, 4, "c"),
]
LAYOUTS = [
    lambda: {"a": row_wise(), "b": table_wise(1), "c": data_parallel()},
    lambda: {"a": column_wise([1, 0, 1, 0]), "b": row_wise(), "c": table_wise(0)},
]


def make(seed=0) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    return EmbeddingBagCollection(CONFIGS)


def sharded(world_size, layout, seed=0) -> EmbeddingBagCollection:
    module = make(seed)
    plan = construct_module_sharding_plan(
        module, LAYOUTS[layout](), world_size=world_size, device_type="cpu"
    )
    return shard(module, plan)


def train(module, optimizer) -> None:
    lengths = torch.tensor([2, 0, 1, 1, 1, 1])
    batch = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([3, 9, 2, 5, 4, 1]), lengths=lengths)
    optimizer.zero_grad()
    module(batch).values().square().sum().backward()
    optimizer.step()


def gather_state(rank, world_size, layout):
    module = sharded(world_size, layout)
    state = module.state_dict()
    assert all(value.shape == make().state_dict()[name].shape for name, value in state.items())
    return {name: value.full() for name, value in state.items()}


@pytest.mark.parametrize("layout", [0, 1])
def test_state_has_the_keys_of_the_plain_one_and_gathers_to_it(ranks, layout):
    wanted = make().state_dict()
    for state in ranks(2, gather_state, layout):
        assert [*state] == [*wanted]
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def load_whole(rank, world_size, layout):
    module, other = sharded(world_size, layout, seed=1), sharded(world_size, 1 - layout, seed=1)
    module.load_state_dict(make(seed=0).state_dict())
    other.load_state_dict(module.state_dict())  # from a state that is sliced otherwise
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    return [{n: v.full() for n, v in m.state_dict().items()} for m in (module, other)]


@pytest.mark.parametrize("layout", [0, 1])
def test_whole_and_otherwise_sliced_tables_are_loaded(ranks, layout):
    wanted = make(seed=0).state_dict()
    for states in ranks(2, load_whole, layout):
        for state in states:
            assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def load_what_does_not_fit(rank, world_size):
    module = sharded(world_size, 1)
    state = make(1).state_dict()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(
        RuntimeError, match=r"size mismatch for embedding_bags.a.weight: .*\[3, 8\]"
    ):
        module.load_state_dict({**state, "embedding_bags.a.weight": torch.ones(3, 8)})
    del state["embedding_bags.b.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"embedding_bags.b.weight"'):
        module.load_state_dict(state)
    a = [s for s in module.stores if s.key == 0]
    return all(torch.equal(store.weight, old) for store, old in zip(a, before, strict=False))


def test_state_that_does_not_fit_is_refused_by_name(ranks):
    ranks(2, load_what_does_not_fit)


def optimizer_states(rank, world_size, layout, optimizer_class):
    module = make()
    optimizer = in_backward(module, optimizer_class, lr=0.1)
    train(module, optimizer)
    wanted = copy.deepcopy(optimizer.state_dict()["state"])
    other = sharded(world_size, layout)
    loaded = in_backward(other, optimizer_class, lr=0.1)
    loaded.load_state_dict({"state": wanted})
    got = loaded.state_dict()["state"]
    assert [*got] == [*wanted]
    failures = []
    for name, values in wanted.items():
        for kind, value in values.items():
            one = got[name][kind]
            whole = one if one.dim() == 0 else one.full()
            failures += [] if torch.equal(whole, value) else [f"{name} {kind}"]
    steps = next(iter(other._parts.bindings)).update.steps
    return failures, steps.tolist()


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("optimizer_class", [RowWiseAdagrad, Adam])
def test_optimizer_state_is_whole_and_loads_into_slices(ranks, layout, optimizer_class):
    for failures, steps in ranks(2, optimizer_states, layout, optimizer_class):
        assert failures == []
        assert {*steps} == {1}


def wrap_before_sharding(rank, world_size):
    module = make()
    optimizer = in_backward(module, Adam, lr=0.1)
    stages = [WarmupStage(WarmupPolicy.CONSTANT, max_iters=5, value=0.5)]
    outer = CombinedOptimizer([("model", WarmupOptimizer(optimizer, stages, lr=0.2))])
    outer.save_param_groups(True)
    plan = construct_module_sharding_plan(
        module, LAYOUTS[1](), world_size=world_size, device_type="cpu"
    )
    shard(module, plan)
    train(module, outer)
    state = outer.state_dict()
    shapes = {n: tuple(v["exp_avg"].shape) for n, v in state["state"].items() if "exp_avg" in v}
    return shapes, state["param_groups"][0]["params"]


def test_optimizers_wrapped_before_sharding_see_the_slices(ranks):
    names = [f"model.embedding_bags.{name}.weight" for name in "abc"]
    for shapes, members in ranks(2, wrap_before_sharding):
        assert shapes == dict(zip(names, [(10, 8), (6, 4), (5, 4)], strict=True))
        assert members == names


def save(rank, world_size, folder, layout):
    module = sharded(world_size, layout)
    optimizer = in_backward(module, Adam, lr=0.1)
    train(module, optimizer)
    checkpoint.save(
        {"model": module.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=folder
    )


def load(rank, world_size, folder, layout):
    module = sharded(world_size, layout, seed=1)
    optimizer = in_backward(module, Adam, lr=0.1)
    state = {"model": module.state_dict(), "optim": optimizer.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    moments = optimizer.state_dict()["state"]["embedding_bags.a.weight"]["exp_avg"].full()
    return {n: v.full() for n, v in module.state_dict().items()}, moments


@pytest.mark.parametrize("layout", [0, 1])
def test_checkpoint_of_one_layout_loads_into_another(ranks, tmp_path, layout):
    ranks(2, save, str(tmp_path), layout)
    module = make()
    optimizer = in_backward(module, Adam, lr=0.1)
    train(module, optimizer)
    wanted = module.state_dict()
    for state, moments in ranks(2, load, str(tmp_path), 1 - layout):
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value)
        torch.testing.assert_close(moments, module.stores[0].states["exp_avg"])


def misuse(rank, world_size):
    value = sharded(world_size, 0).state_dict()["embedding_bags.a.weight"]
    with pytest.raises(RuntimeError, match=r"slices on many ranks .* gather it with .full\(\)"):
        value + 1
    with pytest.raises(TypeError, match="table 'a' cannot be pickled"):
        pickle.dumps(value)
    assert "SlicedTensor((10, 8)" in repr(value)


def test_value_of_slices_does_not_compute_or_pickle(ranks):
    ranks(2, misuse)
