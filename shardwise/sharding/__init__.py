"""Tables over many ranks: what lies where, and how ids and vectors travel."""

from shardwise.sharding.agreement import check_equal_plans, plan_hash
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
from shardwise.sharding.environment import ShardingEnv, get_local_rank, get_local_size
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

__all__ = [
    "EmbeddingComputeKernel",
    "EmbeddingModuleShardingPlan",
    "EnumerableShardingSpec",
    "ParameterSharding",
    "Placement",
    "ShardingEnv",
    "ShardingPlan",
    "ShardingType",
    "Slice",
    "answered",
    "apply_to_all",
    "check_equal_plans",
    "column_wise",
    "construct_module_sharding_plan",
    "data_parallel",
    "get_local_rank",
    "get_local_size",
    "grid_shard",
    "place_tables",
    "plan_hash",
    "row_wise",
    "slices",
    "table_column_wise",
    "table_row_wise",
    "table_wise",
]
