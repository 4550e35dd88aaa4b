"""A plan by bytes alone, for those who give none."""

from collections.abc import Iterator

from torch import nn

from shardwise.sharding.builders import Builder, row_wise, table_wise
from shardwise.sharding.environment import ShardingEnv
from shardwise.sharding.plan import (
    ShardingPlan,
    construct_module_sharding_plan,
    table_configs,
)


def balanced_plan(
    module: nn.Module, env: ShardingEnv, types: set[type[nn.Module]], device_type: str
) -> ShardingPlan:
    """Place tables by their bytes.

    A table above an equal share of all bytes is cut by rows over all ranks; the others, largest
    first, each go to the rank with the fewest bytes so far.

    Args:
        module: A model, or a collection.
        env: The ranks.
        types: The types of the collections to place.
        device_type: Where slices lie, such as "cpu".
    """
    collections = dict(_outermost("", module, types))
    sizes = {
        (path, config.name): config.num_embeddings
        * config.embedding_dim
        * config.data_type.dtype.itemsize
        for path, found in collections.items()
        for config in table_configs(found)
    }
    share = sum(sizes.values()) / env.world_size
    loads = [0] * env.world_size
    builders: dict[str, dict[str, Builder]] = {path: {} for path in collections}
    for path, table in sorted(sizes, key=lambda key: -sizes[key]):
        size = sizes[path, table]
        if size > share:
            builders[path][table] = row_wise()
            continue
        rank = loads.index(min(loads))
        loads[rank] += size
        builders[path][table] = table_wise(rank)
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                found,
                builders[path],
                local_size=1,  # no builder here looks at hosts
                world_size=env.world_size,
                device_type=device_type,
            )
            for path, found in collections.items()
        }
    )


def _outermost(
    path: str, module: nn.Module, types: set[type[nn.Module]]
) -> Iterator[tuple[str, nn.Module]]:
    if type(module) in types:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(f"{path}.{name}" if path else name, child, types)
