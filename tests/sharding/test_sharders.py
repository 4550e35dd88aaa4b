"""Sharders: what they shard, what they say to a planner, their optimizer options."""

from enum import Enum

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import Adam, RowWiseAdagrad, apply_optimizer_in_backward
from shardwise.sharding import (
    EmbeddingBagCollectionSharder,
    EmbeddingCollectionSharder,
    FeatureProcessedEmbeddingBagCollectionSharder,
    FusedEmbeddingBagCollectionSharder,
    FusedEmbeddingCollectionSharder,
    ShardedModule,
    ShardingEnv,
    apply_to_all,
    construct_module_sharding_plan,
    get_default_sharders,
    row_wise,
    table_wise,
)
from shardwise.sharding.codecs import CommType, QCommsConfig, get_qcomm_codecs_registry
from shardwise.sharding.sharders import read_fused_params
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    FeatureProcessedEmbeddingBagCollection,
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
    PositionWeightedModule,
)

BAGS = [EmbeddingBagConfig(6, 4, "a"), EmbeddingBagConfig(5, 4, "b")]
SEQUENCES = [EmbeddingConfig(6, 4, "a"), EmbeddingConfig(5, 4, "b")]
RULE = (torch.optim.SGD, {"lr": 0.5})


def processed() -> FeatureProcessedEmbeddingBagCollection:
    bags = EmbeddingBagCollection(BAGS, is_weighted=True)
    return FeatureProcessedEmbeddingBagCollection(bags, {"a": PositionWeightedModule(3)})


CASES = {
    EmbeddingBagCollectionSharder: lambda: EmbeddingBagCollection(BAGS),
    FusedEmbeddingBagCollectionSharder: lambda: FusedEmbeddingBagCollection(BAGS, *RULE),
    FeatureProcessedEmbeddingBagCollectionSharder: processed,
    EmbeddingCollectionSharder: lambda: EmbeddingCollection(SEQUENCES),
    FusedEmbeddingCollectionSharder: lambda: FusedEmbeddingCollection(SEQUENCES, *RULE),
}


def batch() -> KeyedJaggedTensor:
    weights = torch.tensor([1.0, 2.0, 0.5])
    lengths = torch.tensor([2, 0, 0, 1])
    return KeyedJaggedTensor(["a", "b"], torch.tensor([3, 5, 4]), weights, lengths=lengths)


def shard_one(rank, world_size, sharder_class):
    torch.manual_seed(0)
    plain = CASES[sharder_class]()
    torch.manual_seed(0)
    module, sharder = CASES[sharder_class](), sharder_class()
    assert isinstance(module, sharder.module_type)
    builders = apply_to_all(module, row_wise(), sharder)
    plan = construct_module_sharding_plan(
        module, builders, sharder, world_size=world_size, device_type="cpu"
    )
    env = ShardingEnv.from_process_group(torch.distributed.group.WORLD)
    sharded = sharder.shard(module, plan, env, torch.device("cpu"))
    assert isinstance(sharded, ShardedModule)
    got, wanted = sharded(batch()).wait(), plain(batch())
    if isinstance(wanted, dict):
        got, wanted = (torch.cat([v.values() for v in r.values()]) for r in (got, wanted))
    else:
        got, wanted = got.values(), wanted.values()
    torch.testing.assert_close(got, wanted)
    assert [*sharded.state_dict()] == [*plain.state_dict()]


@pytest.mark.parametrize("sharder_class", CASES)
def test_each_kind_of_collection_is_sharded(ranks, sharder_class):
    ranks(2, shard_one, sharder_class)


def test_default_sharders_are_of_all_kinds():
    assert [type(sharder) for sharder in get_default_sharders()] == [*CASES]


def test_what_a_planner_asks():
    sharder = EmbeddingBagCollectionSharder()
    module = EmbeddingBagCollection(BAGS)
    table = module.embedding_bags["a"].weight
    assert sharder.shardable_parameters(module)["a"] is table
    assert "table_row_wise" in sharder.sharding_types("cpu")
    assert sharder.compute_kernels("row_wise", "cpu") == ["dense", "fused"]
    assert sharder.storage_usage(table, "cuda", "fused") == {"hbm": 96}
    assert sharder.storage_usage(table, "cpu", "fused") == {"ddr": 96}


class Named(Enum):
    EXACT_ROWWISE_ADAGRAD = "exact_row_wise_adagrad"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"learning_rate": 0.2}, ("SGD", {"lr": 0.2})),
        ({"optimizer": Named.EXACT_ROWWISE_ADAGRAD}, ("RowWiseAdagrad", {"lr": 0.01})),
        ({"optimizer": "adam", "beta1": 0.8}, ("Adam", {"beta1": 0.8, "lr": 0.01})),
        ({"optimizer": Adam, "lr": 0.3}, ("Adam", {"lr": 0.3})),
        (
            {"weight_decay": 0.1, "weight_decay_mode": 2},
            ("SGD", {"weight_decay": 0.1, "decoupled": True, "lr": 0.01}),
        ),
        ({"weight_decay": 0.1, "weight_decay_mode": 0}, ("SGD", {"lr": 0.01})),
        ({"max_gradient": 1.0, "gradient_clipping": False}, ("SGD", {"lr": 0.01})),
    ],
)
def test_fused_params_name_a_rule(given, wanted):
    optimizer_class, options = read_fused_params(given)
    assert (optimizer_class.__name__, options) == wanted


def test_fused_params_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="optimizer 'ftrl'; there are"):
        read_fused_params({"optimizer": "ftrl"})
    with pytest.raises(ValueError, match="weight_decay_mode 4; wants 0, 1 or 2"):
        read_fused_params({"weight_decay_mode": 4})


def test_fused_params_reach_the_tables_without_a_rule():
    module = EmbeddingBagCollection(BAGS)
    apply_optimizer_in_backward(RowWiseAdagrad, [module.embedding_bags["b"].weight], {"lr": 0.3})
    sharder = EmbeddingBagCollectionSharder({"optimizer": "adam", "learning_rate": 0.2})
    plan = construct_module_sharding_plan(
        module, apply_to_all(module, row_wise()), world_size=1, device_type="cpu"
    )
    sharded = sharder.shard(module, plan, ShardingEnv.from_local(1, 0))
    rules = [one.param_groups[0] for one in sharded.fused_optimizers]
    assert [(group["rule"], group["lr"]) for group in rules] == [
        ("adam", 0.2),
        ("row_wise_adagrad", 0.3),
    ]


def test_options_no_rule_has_are_refused():
    module = nn.Sequential(EmbeddingBagCollection(BAGS))
    sharder = EmbeddingBagCollectionSharder({"cache_load_factor": 0.1})
    sharder.tag_tables(module)
    with pytest.raises(ValueError, match="has no option cache_load_factor"):
        module[0](batch())


def shard_with_codecs(rank, world_size):
    module = EmbeddingBagCollection([EmbeddingBagConfig(6, 4, "a")])
    torch.nn.init.constant_(module.embedding_bags["a"].weight, 1 + 2**-10)  # 1 in bf16
    plan = construct_module_sharding_plan(
        module, {"a": table_wise(0)}, world_size=world_size, device_type="cpu"
    )
    config = QCommsConfig(forward_precision=CommType.BF16)
    sharder = EmbeddingBagCollectionSharder(qcomm_codecs_registry=get_qcomm_codecs_registry(config))
    env = ShardingEnv.from_process_group(torch.distributed.group.WORLD)
    sharded = sharder.shard(module, plan, env)
    ids = KeyedJaggedTensor(["a"], torch.tensor([3]), lengths=torch.tensor([1]))
    return sharded(ids).values().flatten().tolist()


def test_codecs_of_the_registry_are_used(ranks):
    assert ranks(2, shard_with_codecs)[1] == [1.0] * 4
