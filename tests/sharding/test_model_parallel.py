"""`DistributedModelParallel`: names, state, optimizers, lazy results, meta models, its wrappers."""

import copy

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRM
from shardwise.optim import (
    CombinedOptimizer,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    apply_optimizer_in_backward,
    in_backward_optimizer_filter,
)
from shardwise.sharding import (
    Awaitable,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    EmbeddingModuleShardingPlan,
    ShardedModule,
    ShardingEnv,
    ShardingPlan,
    get_module,
    get_unsharded_module_names,
    get_unwrapped_module,
    shard_modules,
)
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    FeatureProcessedEmbeddingBagCollection,
    PositionWeightedModuleCollection,
)

PATH = "sparse_arch.embedding_bag_collection.embedding_bags"


def make(device="cpu", seed=0) -> DLRM:
    torch.manual_seed(seed)
    tables = [EmbeddingBagConfig(40, 8, "a"), EmbeddingBagConfig(6, 8, "b")]
    model = DLRM(EmbeddingBagCollection(tables, device=device), 3, [4, 8], [4, 1])
    options = {"lr": 0.1, "eps": 1e-3}
    apply_optimizer_in_backward(RowWiseAdagrad, model.sparse_arch.parameters(), options)
    return model


def inputs(rank, step, size=4):
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, 6, (2 * size,), generator=generator)
    features = KeyedJaggedTensor(["a", "b"], ids, lengths=torch.ones(2 * size).long())
    return torch.rand(size, 3, generator=generator), features


def join(ranks, step):
    parts = [inputs(rank, step) for rank in range(ranks)]
    ids = torch.cat([features.values().view(2, -1) for _, features in parts], 1)
    lengths = torch.ones(ids.numel()).long()
    return torch.cat([dense for dense, _ in parts]), KeyedJaggedTensor(
        ["a", "b"], ids.flatten(), lengths=lengths
    )


def optimizers(model) -> CombinedOptimizer:
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    wrapped = KeyedOptimizerWrapper(dense, lambda params: torch.optim.SGD(params, lr=0.1))
    if isinstance(model, DistributedModelParallel):
        return CombinedOptimizer([model.fused_optimizer, wrapped])
    fused = model.sparse_arch.embedding_bag_collection.fused_optimizers
    prefix = "sparse_arch.embedding_bag_collection"
    return CombinedOptimizer([*((prefix, one) for one in fused), wrapped])


def train(model, optimizer, batch) -> float:
    optimizer.zero_grad()
    loss = model(*batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def train_both(rank, world_size):
    plain, model = make(), DistributedModelParallel(make())
    plain_optimizer, optimizer = optimizers(plain), optimizers(model)
    pairs = [
        (
            train(model, optimizer, inputs(rank, step)),
            train(plain, plain_optimizer, join(world_size, step)),
        )
        for step in range(3)
    ]
    wanted, state = plain.state_dict(), model.state_dict()
    assert [*state] == [*wanted]
    for name, value in state.items():
        value = value.full() if hasattr(value, "full") else value
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    assert [*optimizer.state_dict()["state"]] == [*plain_optimizer.state_dict()["state"]]
    return pairs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_model_trains_as_the_plain_one(ranks, world_size):
    results = ranks(world_size, train_both)
    for step in zip(*results, strict=True):
        mean = sum(ours for ours, _ in step) / world_size
        assert mean == pytest.approx(step[0][1], rel=1e-5)


def look_at_names(rank, world_size):
    model = DistributedModelParallel(make())
    plain = make()
    names = dict(model.named_parameters())
    assert [*names] == [name for name, _ in plain.named_parameters()]
    bare = dict(model.bare_named_parameters())
    assert [*bare] == [name for name in names if not name.startswith("sparse_arch")]
    assert [*dict(in_backward_optimizer_filter(model.named_parameters()))] == [*bare]
    assert [*model.fused_optimizer.params] == [f"{PATH}.a.weight", f"{PATH}.b.weight"]
    assert model.sparse_grad_parameter_names() == []
    assert get_unwrapped_module(model) is model.module
    assert isinstance(get_module(model), nn.parallel.DistributedDataParallel)
    assert isinstance(model.module, DLRM)
    return get_unsharded_module_names(model)


def test_names_are_those_of_the_model(ranks):
    wanted = ["dense_arch", "inter_arch", "over_arch"]
    assert ranks(2, look_at_names) == [wanted, wanted]


def load_states(rank, world_size):
    first, second = DistributedModelParallel(make(seed=0)), DistributedModelParallel(make(seed=1))
    second.load_state_dict(first.state_dict())
    third = DistributedModelParallel(make(seed=2))
    third.load_state_dict(make(seed=0).state_dict())
    outs = [model(*inputs(rank, 0)) for model in (first, second, third)]
    return torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_states_are_loaded(ranks):
    assert ranks(2, load_states) == [True, True]


def build_on_meta(rank, world_size):
    torch.manual_seed(rank)
    tables = [EmbeddingBagConfig(40, 8, "a"), EmbeddingBagConfig(6, 8, "b")]
    collection = EmbeddingBagCollection(tables, device="meta")
    model = DLRM(collection, 3, [4, 8], [4, 1], dense_device=torch.device("meta"))
    model = DistributedModelParallel(model, init_data_parallel=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.init_data_parallel()
    dense, _ = next(model.bare_named_parameters())
    return model.state_dict()[dense], model(*inputs(rank, 0)).shape


def test_model_on_meta_is_drawn_and_its_dense_part_equal(ranks):
    (first, shape), (second, _) = ranks(2, build_on_meta)
    assert shape == (4, 1)
    assert torch.equal(first, second)


def draw_processors(rank, world_size):
    bags = EmbeddingBagCollection([EmbeddingBagConfig(6, 8, "a")], True, "meta")
    weights = PositionWeightedModuleCollection({"a": 3}, torch.device("meta"))
    model = FeatureProcessedEmbeddingBagCollection(bags, weights)
    model = DistributedModelParallel(model)
    with pytest.raises(ValueError, match="Bare is on meta and neither it nor"):
        DistributedModelParallel(Bare())
    return model.module._feature_processors.position_weights["a"].detach()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, device="meta"))


def test_parts_on_meta_are_drawn_by_the_module_around_them(ranks):
    assert torch.equal(ranks(1, draw_processors)[0], torch.ones(3))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingCollection([EmbeddingConfig(9, 4, "a")])

    def forward(self, features):
        return self.tables(features)


def use_lazily(rank, world_size):
    bags = shard_modules(make()).sparse_arch.embedding_bag_collection
    assert isinstance(bags, ShardedModule)
    result = bags(inputs(rank, 0)[1])
    assert isinstance(result, Awaitable)
    plain = make().sparse_arch.embedding_bag_collection(inputs(rank, 0)[1])
    torch.testing.assert_close(result["b"], plain["b"])
    ids = KeyedJaggedTensor(["a"], torch.tensor([1, 8, 1]), lengths=torch.tensor([2, 1]))
    vectors = shard_modules(Sequences())(ids)
    assert isinstance(vectors, Awaitable)
    return vectors["a"].values().shape


def test_collections_give_awaitables(ranks):
    assert ranks(2, use_lazily) == [(3, 4), (3, 4)]


def step_by_step(rank, world_size):
    bags = shard_modules(make()).sparse_arch.embedding_bag_collection
    features = inputs(rank, 0)[1]
    context = bags.create_context()
    ids = bags.input_dist(context, features).wait().wait()
    by_steps = bags.output_dist(context, bags.compute(context, ids))
    context = bags.create_context()
    ids = bags.input_dist(context, features).wait().wait()
    at_once = bags.compute_and_output_dist(context, ids)
    wanted = bags(features).values()
    return torch.equal(by_steps.values(), wanted) and torch.equal(at_once.values(), wanted)


def test_steps_of_an_exchange_can_be_taken_one_by_one(ranks):
    assert ranks(2, step_by_step) == [True, True]


def compress(rank, world_size):
    wrapper = DefaultDataParallelWrapper(allreduce_comm_precision="fp16", static_graph=False)
    model = DistributedModelParallel(make(), data_parallel_wrapper=wrapper)
    train(model, optimizers(model), inputs(rank, 0))
    return [parameter.detach() for _, parameter in model.bare_named_parameters()]


def test_dense_gradients_may_be_compressed(ranks):
    first, second = ranks(2, compress)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_available_is_refused():
    with pytest.raises(ValueError, match="nothing is tracked; give the model a model_tracker"):
        DistributedModelParallel(make()).get_model_tracker()
    with pytest.raises(ValueError, match=r"allreduce_comm_precision 'fp8'; wants one of"):
        DefaultDataParallelWrapper(allreduce_comm_precision="fp8")
    plan = ShardingPlan({"": EmbeddingModuleShardingPlan()})
    with pytest.raises(ValueError, match="'', a Linear; there are sharders of"):
        shard_modules(nn.Linear(1, 1), ShardingEnv.from_local(1, 0), plan=plan)


def test_copies_are_independent():
    model = make()
    twin = copy.deepcopy(model)
    shard_modules(twin, ShardingEnv.from_local(1, 0))
    assert not isinstance(model.sparse_arch.embedding_bag_collection, ShardedModule)
