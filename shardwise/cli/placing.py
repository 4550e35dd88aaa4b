"""Where the tables of a model lie when several processes train it."""

from pathlib import Path

from torch import nn

from shardwise.cli.config import PLACEMENTS
from shardwise.optim.in_backward import table_holders
from shardwise.sharding.balance import balanced_plan
from shardwise.sharding.builders import Builder, column_wise, data_parallel, row_wise, table_wise
from shardwise.sharding.plan import ShardingPlan, construct_module_sharding_plan, table_configs
from shardwise.sharding.shard import default_env


def make_plan(sharding: str, model: nn.Module) -> ShardingPlan:
    """Give the plan that `train.sharding` asks for.

    Args:
        sharding: One of `config.PLACEMENTS`, or a JSON file that `ShardingPlan.save` wrote.
        model: What will be placed.

    Raises:
        ValueError: The file holds no plan, or a table cannot be cut so.
        OSError: The file cannot be read.
    """
    env, collections = default_env(), dict(table_holders(model))
    modules = {path: model.get_submodule(path) for path in collections}
    if sharding == "auto":
        return balanced_plan(model, env, {type(module) for module in modules.values()}, "cpu")
    if sharding not in PLACEMENTS:
        return ShardingPlan.load(Path(sharding))
    ranks = range(env.world_size)
    alike = {
        "row_wise": row_wise(),
        "column_wise": column_wise(ranks),
        "data_parallel": data_parallel(),
    }
    tables = [(path, config) for path, m in modules.items() for config in table_configs(m)]
    # Whole tables go to the ranks in turn, the largest first.
    tables.sort(key=lambda table: -table[1].num_embeddings * table[1].embedding_dim)
    builders: dict[str, dict[str, Builder]] = {path: {} for path in modules}
    for turn, (path, config) in enumerate(tables):
        builders[path][config.name] = alike.get(sharding) or table_wise(turn % len(ranks))
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                module, builders[path], world_size=env.world_size, device_type="cpu"
            )
            for path, module in modules.items()
        }
    )
