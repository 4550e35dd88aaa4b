"""Tables over many ranks: what lies where, and how ids and vectors travel."""

from shardwise.sharding.agreement import check_equal_plans, plan_hash
from shardwise.sharding.awaitable import Awaitable, LazyAwaitable, NoWait
from shardwise.sharding.builders import (
    answered,
    column_wise,
    data_parallel,
    grid_shard,
    row_wise,
    slices,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from shardwise.sharding.codecs import (
    CommOp,
    CommType,
    QCommsConfig,
    get_qcomm_codecs,
    get_qcomm_codecs_registry,
)
from shardwise.sharding.dense import dense_parallel
from shardwise.sharding.environment import ShardingEnv, get_local_rank, get_local_size
from shardwise.sharding.in_step import in_step, together
from shardwise.sharding.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    get_module,
    get_unsharded_module_names,
    get_unwrapped_module,
    shard_modules,
)
from shardwise.sharding.parameter_sharding import (
    EmbeddingComputeKernel,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingType,
)
from shardwise.sharding.placement import Placement, Slice
from shardwise.sharding.plan import (
    EmbeddingModuleShardingPlan,
    ShardingPlan,
    apply_to_all,
    construct_module_sharding_plan,
    place_tables,
)
from shardwise.sharding.reshard import ReshardReport, reshard, reshard_cost
from shardwise.sharding.shard import shard, sharded_parameters
from shardwise.sharding.sharded_modules import (
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
    ShardedFeatureProcessedEmbeddingBagCollection,
    ShardedFusedEmbeddingBagCollection,
    ShardedFusedEmbeddingCollection,
    ShardedModule,
)
from shardwise.sharding.sharders import (
    EmbeddingBagCollectionSharder,
    EmbeddingCollectionSharder,
    FeatureProcessedEmbeddingBagCollectionSharder,
    FusedEmbeddingBagCollectionSharder,
    FusedEmbeddingCollectionSharder,
    ModuleSharder,
    get_default_sharders,
)
from shardwise.sharding.sliced import SlicedTensor
from shardwise.sharding.two_dim import DMPCollection, ShardingEnv2D, group_ranks, replicate_plan
from shardwise.sharding.wire import Wire

__all__ = [
    "Awaitable",
    "CommOp",
    "CommType",
    "DMPCollection",
    "DataParallelWrapper",
    "DefaultDataParallelWrapper",
    "DistributedModelParallel",
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollectionSharder",
    "EmbeddingComputeKernel",
    "EmbeddingModuleShardingPlan",
    "EnumerableShardingSpec",
    "FeatureProcessedEmbeddingBagCollectionSharder",
    "FusedEmbeddingBagCollectionSharder",
    "FusedEmbeddingCollectionSharder",
    "LazyAwaitable",
    "ModuleSharder",
    "NoWait",
    "ParameterSharding",
    "Placement",
    "QCommsConfig",
    "ReshardReport",
    "ShardedEmbeddingBagCollection",
    "ShardedEmbeddingCollection",
    "ShardedFeatureProcessedEmbeddingBagCollection",
    "ShardedFusedEmbeddingBagCollection",
    "ShardedFusedEmbeddingCollection",
    "ShardedModule",
    "ShardingEnv",
    "ShardingEnv2D",
    "ShardingPlan",
    "ShardingType",
    "Slice",
    "SlicedTensor",
    "Wire",
    "answered",
    "apply_to_all",
    "check_equal_plans",
    "column_wise",
    "construct_module_sharding_plan",
    "data_parallel",
    "dense_parallel",
    "get_default_sharders",
    "get_local_rank",
    "get_local_size",
    "get_module",
    "get_qcomm_codecs",
    "get_qcomm_codecs_registry",
    "get_unsharded_module_names",
    "get_unwrapped_module",
    "grid_shard",
    "group_ranks",
    "in_step",
    "place_tables",
    "plan_hash",
    "replicate_plan",
    "reshard",
    "reshard_cost",
    "row_wise",
    "shard",
    "shard_modules",
    "sharded_parameters",
    "slices",
    "table_column_wise",
    "table_row_wise",
    "table_wise",
    "together",
]
