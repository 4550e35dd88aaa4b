"""How one table is sharded, in the words of a plan: a type, a kernel, blocks and their ranks."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from shardwise.sharding.placement import Answer, Lines, Slice, lines_of
from shardwise.tables.configs import BaseEmbeddingConfig

if TYPE_CHECKING:
    from torch.distributed._shard.metadata import ShardMetadata


class ShardingType(Enum):
    """The usual ways to cut a table, and `SLICES` for all others.

    Only builders and reports know them: what moves ids and vectors reads the slices.
    """

    DATA_PARALLEL = "data_parallel"
    TABLE_WISE = "table_wise"
    COLUMN_WISE = "column_wise"
    ROW_WISE = "row_wise"
    TABLE_ROW_WISE = "table_row_wise"
    TABLE_COLUMN_WISE = "table_column_wise"
    GRID_SHARD = "grid_shard"
    SLICES = "slices"


class EmbeddingComputeKernel(Enum):
    """Whether a table is updated in backward (FUSED) or leaves its gradient (DENSE).

    The rule bound to the table decides; a plan says what its maker reckoned with.
    """

    DENSE = "dense"
    FUSED = "fused"


class EnumerableShardingSpec:
    """The blocks of a table with their ranks, in a plan's order.

    Equal blocks on several ranks are replicas; a block may be empty.

    Args:
        shards: What to take over, each with `shard_offsets`, `shard_sizes` and a `placement` such
            as `rank:3/cpu`.

    Attributes:
        lines: The blocks, int64 [blocks, 5]: first row, last row + 1, first column, last column
            + 1, rank.
        devices: The device of each block, such as `cpu` or `cuda:1`.
    """

    def __init__(self, shards: Iterable["ShardMetadata"]) -> None:
        """Take shards over."""
        lines, devices = [], []
        for shard in shards:
            (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
            rank, device = _read_place(str(shard.placement))
            lines.append((row, row + rows, column, column + columns, rank))
            devices.append(device)
        self.lines: Lines = np.array(lines, dtype=np.int64).reshape(-1, 5)
        self.devices: tuple[str, ...] = tuple(devices)

    @classmethod
    def from_lines(cls, lines: Lines, devices: Sequence[str]) -> "EnumerableShardingSpec":
        """Take blocks over as they are kept."""
        spec = cls(())
        spec.lines, spec.devices = lines, tuple(devices)
        return spec

    @property
    def shards(self) -> "list[ShardMetadata]":
        """The blocks as PyTorch describes them, made anew at each call."""
        from torch.distributed._shard.metadata import ShardMetadata

        return [
            ShardMetadata([row, column], [end - row, last - column], f"rank:{rank}/{device}")
            for (row, end, column, last, rank), device in zip(
                self.lines.tolist(), self.devices, strict=True
            )
        ]

    def __eq__(self, other: object) -> bool:
        """Compare blocks, ranks and devices, in order."""
        if not isinstance(other, EnumerableShardingSpec):
            return NotImplemented
        return self.devices == other.devices and np.array_equal(self.lines, other.lines)

    __hash__ = None  # type: ignore[assignment]  # as other containers of a plan

    def __repr__(self) -> str:
        """Show the size."""
        return f"EnumerableShardingSpec({len(self.lines)} shards)"


def _read_place(place: str) -> tuple[int, str]:
    found = re.fullmatch(r"rank:(\d+)/(\w+(?::\d+)?)", place)
    if not found:
        raise ValueError(f"a shard's placement is {place!r}; wants one such as 'rank:0/cpu'")
    return int(found[1]), found[2]


_KNOWN = {
    "sharding_type": [kind.value for kind in ShardingType],
    "compute_kernel": [kernel.value for kernel in EmbeddingComputeKernel],
    "answer": list(get_args(Answer)),
}
_REFUSED = {
    "cache_params": "tables lie wholly in the memory of their device",
    "key_value_params": "tables lie wholly in the memory of their device",
    "stochastic_rounding": "it is an option of the table's update rule",
    "bounds_check_mode": "it is the option bad_ids of the collection",
    "output_dtype": "results have the type that the collection gives",
}


@dataclass
class ParameterSharding:
    """How one table is sharded.

    Attributes:
        sharding_type: A value of `ShardingType`; says how the blocks came to be.
        compute_kernel: A value of `EmbeddingComputeKernel`.
        ranks: Ranks in the order of the blocks; for data-parallel tables, all that hold it.
        sharding_spec: The blocks; data-parallel tables need none.
        cache_params: Not available.
        enforce_hbm: Holds either way, as tables lie wholly in the memory of their device.
        stochastic_rounding: Not here, but an option of update rules.
        bounds_check_mode: Not here, but the option `bad_ids` of collections.
        output_dtype: Not available.
        key_value_params: Not available.
        answer: How the owners answer, by partials or rows; see `Placement`.
        relay: Whether ids for several ranks of one other host go there once.
    """

    sharding_type: str
    compute_kernel: str
    ranks: list[int] | None = None
    sharding_spec: EnumerableShardingSpec | Any | None = None  # Any: PyTorch's own, on its way in
    cache_params: object | None = None
    enforce_hbm: bool | None = None
    stochastic_rounding: bool | None = None
    bounds_check_mode: object | None = None
    output_dtype: object | None = None
    key_value_params: object | None = None
    answer: Answer = "partials"
    relay: bool = True

    def __post_init__(self) -> None:
        """Take over PyTorch's own form of the blocks."""
        spec = self.sharding_spec
        if spec is not None and not isinstance(spec, EnumerableShardingSpec):
            self.sharding_spec = EnumerableShardingSpec(spec.shards)

    @classmethod
    def from_slices(
        cls, slices: Sequence[Slice], *, compute_kernel: str = "dense", device: str = "cpu"
    ) -> "ParameterSharding":
        """Take the slices of one table, in their order."""
        lines = lines_of(slices)
        return cls(
            ShardingType.SLICES.value,
            compute_kernel,
            lines[:, 4].tolist(),
            EnumerableShardingSpec.from_lines(lines, [device] * len(lines)),
        )

    def check(self, table: str) -> None:
        """Refuse words that plans do not know, and options that do nothing here.

        Raises:
            ValueError: Names the table and the field.
        """
        for field, values in _KNOWN.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"table {table!r}: {field} {getattr(self, field)!r}; wants one of {values}"
                )
        for field, reason in _REFUSED.items():
            if getattr(self, field) is not None:
                raise ValueError(
                    f"table {table!r}: {field}={getattr(self, field)!r} is not for a plan "
                    f"({reason}); leave it at None"
                )

    def to_lines(self, config: BaseEmbeddingConfig, world_size: int) -> Lines:
        """Give the blocks of a table, one line for each and its rank.

        Raises:
            ValueError: There are no blocks, or as for `check`.
        """
        self.check(config.name)
        if self.sharding_spec is not None:
            return self.sharding_spec.lines
        if self.sharding_type != ShardingType.DATA_PARALLEL.value:
            raise ValueError(
                f"table {config.name!r}: {self.sharding_type} needs a sharding_spec, got None; "
                f"make the plan with construct_module_sharding_plan"
            )
        ranks = range(world_size) if self.ranks is None else self.ranks
        whole = (0, config.num_embeddings, 0, config.embedding_dim)
        return np.array([(*whole, rank) for rank in ranks], dtype=np.int64).reshape(-1, 5)

    def to_slices(self, config: BaseEmbeddingConfig, world_size: int) -> list[Slice]:
        """Give the slices of a table: equal blocks as one with several ranks, empty ones not.

        Raises:
            ValueError: As for `to_lines`.
        """
        ranks: dict[tuple[int, ...], list[int]] = {}
        for *block, rank in self.to_lines(config, world_size).tolist():
            ranks.setdefault(tuple(block), []).append(rank)
        return [
            Slice(config.name, (first, end), (left, right), tuple(holders))
            for (first, end, left, right), holders in ranks.items()
            if first != end and left != right
        ]
