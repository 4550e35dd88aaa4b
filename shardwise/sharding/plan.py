"""Plans: how each table of a module, or of a whole model, is sharded; as text, as JSON, in force.

`place_tables` turns a module's plan into the placements that the exchange reads.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from shardwise.sharding.builders import Builder, Site
from shardwise.sharding.environment import equal_hosts, get_local_size
from shardwise.sharding.parameter_sharding import (
    EmbeddingComputeKernel,
    EnumerableShardingSpec,
    ParameterSharding,
)
from shardwise.sharding.placement import Placement, Slice, place
from shardwise.tables.configs import BaseEmbeddingConfig

_FORMAT = "shardwise plan 1"
_HEADS = ("module", "table", "sharding", "kernel", "answer", "ranks", "blocks", "largest block")


class EmbeddingModuleShardingPlan(dict[str, ParameterSharding]):
    """How each table of a collection is sharded, by table name; prints as a table."""

    def __str__(self) -> str:
        """Show one line per table."""
        return _print_table(_HEADS[1:], [_row(*item) for item in self.items()])


@dataclass
class ShardingPlan:
    """How the collections of a model are sharded; prints as a table.

    Attributes:
        plan: The plan of each collection, by its path in the model.
    """

    plan: dict[str, EmbeddingModuleShardingPlan] = field(default_factory=dict)

    def get_plan_for_module(self, module_path: str) -> EmbeddingModuleShardingPlan | None:
        """Give the plan of one collection; None if it stays as it is."""
        return self.plan.get(module_path)

    def __str__(self) -> str:
        """Show one line per table."""
        rows = [(path, *_row(*item)) for path, own in self.plan.items() for item in own.items()]
        return _print_table(_HEADS, rows)

    def to_json(self) -> str:
        """Write the plan as text that `from_json` reads back exactly.

        Raises:
            ValueError: A table has an option that plans do not know.
        """
        modules = {
            path: {table: _to_fields(table, sharding) for table, sharding in own.items()}
            for path, own in self.plan.items()
        }
        return json.dumps({"format": _FORMAT, "plan": modules})

    @classmethod
    def from_json(cls, text: str) -> "ShardingPlan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"not a plan: wants JSON with format {_FORMAT!r}, got {text[:60]!r}")
        return cls(
            {
                path: EmbeddingModuleShardingPlan(
                    {table: _from_fields(fields) for table, fields in own.items()}
                )
                for path, own in content["plan"].items()
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the plan into a JSON file."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ShardingPlan":
        """Read the plan of a JSON file."""
        return cls.from_json(Path(path).read_text())


# ---- as JSON


def _to_fields(table: str, sharding: ParameterSharding) -> dict[str, Any]:
    sharding.check(table)
    fields = {name: value for name, value in vars(sharding).items() if value is not None}
    spec: EnumerableShardingSpec | None = fields.pop("sharding_spec", None)
    if spec is not None:
        fields["blocks"] = spec.lines.tolist()
        fields["devices"] = list(spec.devices)
        if len(set(spec.devices)) == 1:
            fields["devices"] = spec.devices[0]
    return fields


def _from_fields(fields: Mapping[str, Any]) -> ParameterSharding:
    fields = dict(fields)
    blocks, devices = fields.pop("blocks", None), fields.pop("devices", [])
    if blocks is not None:
        lines = np.array(blocks, dtype=np.int64).reshape(-1, 5)
        devices = [devices] * len(lines) if isinstance(devices, str) else devices
        fields["sharding_spec"] = EnumerableShardingSpec.from_lines(lines, devices)
    return ParameterSharding(**fields)


# ---- as a table of text


def _row(table: str, sharding: ParameterSharding) -> tuple[str, ...]:
    ranks = _print_ranks(sharding.ranks) if sharding.ranks is not None else "all"
    kind, kernel, answer = sharding.sharding_type, sharding.compute_kernel, sharding.answer
    if sharding.sharding_spec is None:
        return table, kind, kernel, answer, ranks, "1", "whole table"
    lines = sharding.sharding_spec.lines
    heights, widths = lines[:, 1] - lines[:, 0], lines[:, 3] - lines[:, 2]
    largest = int((heights * widths).argmax()) if len(lines) else -1
    block = f"{heights[largest]} x {widths[largest]}" if len(lines) else "none"
    return table, kind, kernel, answer, ranks, str(len(np.unique(lines[:, :4], axis=0))), block


def _print_ranks(ranks: Iterable[int]) -> str:
    """Write ranks shortly: 0-3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


# ---- in force


def table_configs(module: nn.Module) -> list[BaseEmbeddingConfig]:
    """Give the tables of a collection, in its order.

    Raises:
        TypeError: The module is no collection of tables.
    """
    for name in ("embedding_bag_configs", "embedding_configs"):
        if hasattr(module, name):
            return list(getattr(module, name)())
    raise TypeError(
        f"{type(module).__name__} is no collection of tables: it has neither "
        f"embedding_bag_configs() nor embedding_configs()"
    )


def place_tables(
    configs: Sequence[BaseEmbeddingConfig],
    plan: Mapping[str, ParameterSharding] | Sequence[Slice],
    *,
    world_size: int,
    is_pooled: bool,
) -> list[Placement]:
    """Give the placements of a collection's tables, in the normal form.

    Args:
        configs: The tables.
        plan: How each is sharded, by name; or slices that tile all of them.
        world_size: Ranks there are.
        is_pooled: False answers all tables by rows, as bags that are not pooled need it.

    Returns:
        One placement per table, in the order of `configs`.

    Raises:
        ValueError: The plan lacks a table or has one too many, its blocks do not tile a table, or
            a rank does not exist.
    """
    planned = list(plan) if isinstance(plan, Mapping) else [part.table for part in plan]
    names = [config.name for config in configs]
    missing = [name for name in names if name not in set(planned)]
    unknown = [name for name in dict.fromkeys(planned) if name not in set(names)]
    if missing or unknown:
        raise ValueError(
            f"plan for the collection of tables {names}: missing {missing}, unknown {unknown}"
        )
    if not isinstance(plan, Mapping):
        plan = _group_slices(plan)
    placements = []
    for config in configs:
        sharding = plan[config.name]
        shape = (config.num_embeddings, config.embedding_dim)
        lines = sharding.to_lines(config, world_size)
        answer = sharding.answer if is_pooled else "rows"
        placements.append(
            place(
                config.name,
                shape,
                lines,
                world_size=world_size,
                answer=answer,
                relay=sharding.relay,
            )
        )
    return placements


def _group_slices(slices: Iterable[Slice]) -> dict[str, ParameterSharding]:
    grouped: dict[str, list[Slice]] = {}
    for part in slices:
        grouped.setdefault(part.table, []).append(part)
    return {table: ParameterSharding.from_slices(own) for table, own in grouped.items()}


# ---- made by builders


def construct_module_sharding_plan(
    module: nn.Module,
    per_param_sharding: Mapping[str, Builder],
    sharder: Any | None = None,
    local_size: int | None = None,
    world_size: int | None = None,
    device_type: str | None = None,
) -> EmbeddingModuleShardingPlan:
    """Run one builder per table of a collection.

    Args:
        module: The collection.
        per_param_sharding: A builder per table name, for all tables.
        sharder: Asked by `shardable_parameters(module)` which tables there are, if given.
        local_size: Ranks per host; None asks `get_local_size`.
        world_size: Ranks there are; None asks the default process group.
        device_type: Where slices lie; None takes "cuda" where there is one, else "cpu".

    Returns:
        The plan, tables in the collection's order.

    Raises:
        ValueError: A table has no builder, a name is no table, or a builder cannot do it.
    """
    configs = {config.name: config for config in table_configs(module)}
    if sharder is not None:
        wanted = sharder.shardable_parameters(module)
        configs = {name: config for name, config in configs.items() if name in wanted}
    missing = [name for name in configs if name not in per_param_sharding]
    unknown = [name for name in per_param_sharding if name not in configs]
    if missing or unknown:
        raise ValueError(
            f"collection of tables {list(configs)}: want one builder per table; missing "
            f"{missing}, unknown {unknown}"
        )
    world_size = dist.get_world_size() if world_size is None else world_size
    local_size = get_local_size(world_size) if local_size is None else local_size
    hosts = equal_hosts(world_size, local_size)
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    fused = _tagged_tables(module)
    plan = EmbeddingModuleShardingPlan()
    for name, config in configs.items():
        kernel = EmbeddingComputeKernel.FUSED if name in fused else EmbeddingComputeKernel.DENSE
        plan[name] = per_param_sharding[name](Site(config, hosts, device_type, kernel.value))
    return plan


def _tagged_tables(module: nn.Module) -> set[str]:
    """Name the tables whose parameter is tagged with an optimizer in backward."""
    return {
        name.split(".")[-2]
        for name, parameter in module.named_parameters()
        if name.endswith(".weight") and getattr(parameter, "_optimizer_classes", None)
    }


def apply_to_all(
    module: nn.Module, sharding_generator: Builder, sharder: Any | None = None
) -> dict[str, Builder]:
    """Give one builder to all tables of a collection, for `construct_module_sharding_plan`.

    Args:
        module: The collection.
        sharding_generator: The builder.
        sharder: Asked by `shardable_parameters(module)` which tables there are, if given.
    """
    wanted = None if sharder is None else sharder.shardable_parameters(module)
    return {
        config.name: sharding_generator
        for config in table_configs(module)
        if wanted is None or config.name in wanted
    }
