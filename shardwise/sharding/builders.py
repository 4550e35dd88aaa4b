"""The usual ways to cut a table: each gives a function from a table and the ranks to its sharding.

Block sizes follow TorchRec 1.8: rows in blocks of ceil(rows / ranks), the last ones short or empty.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from shardwise.sharding.environment import Hosts
from shardwise.sharding.parameter_sharding import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingType,
)
from shardwise.sharding.placement import Answer, Lines, Slice, lines_of
from shardwise.tables.configs import BaseEmbeddingConfig

Limits: TypeAlias = Sequence[tuple[int, int]]

MIN_PARTITION = 128
"""Columns below which `column_wise` does not cut unless told to."""


@dataclass(frozen=True)
class Site:
    """What a builder is told.

    Attributes:
        config: The table.
        hosts: The ranks of each host.
        device_type: Where all slices lie, such as "cpu".
        compute_kernel: What to write into the plan if the builder was given no kernel.
    """

    config: BaseEmbeddingConfig
    hosts: Hosts
    device_type: str
    compute_kernel: str

    @property
    def world_size(self) -> int:
        """Ranks there are."""
        return sum(map(len, self.hosts))

    def host(self, index: int) -> tuple[int, ...]:
        """Give the ranks of a host.

        Raises:
            ValueError: There is no such host.
        """
        if not 0 <= index < len(self.hosts):
            raise ValueError(
                f"table {self.config.name!r}: placed on host {index}, but there are hosts 0 to "
                f"{len(self.hosts) - 1}"
            )
        return self.hosts[index]


Builder: TypeAlias = Callable[[Site], ParameterSharding]


# ---- block sizes


def split_rows(num_rows: int, num_blocks: int, num_buckets: int | None = None) -> Limits:
    """Cut rows into blocks: first row and last row + 1 of each.

    Args:
        num_rows: Rows of the table.
        num_blocks: Blocks wanted; late ones may be short or empty.
        num_buckets: Equal parts of the rows that must stay whole: each block has as many, the
            first ones one more; None for single rows in blocks of ceil(num_rows / num_blocks).

    Raises:
        ValueError: The rows do not divide into the buckets.
    """
    if num_buckets is None:
        size = -(-num_rows // num_blocks)
        cuts = [min(size * block, num_rows) for block in range(num_blocks + 1)]
    else:
        if num_buckets < 1 or num_rows % num_buckets:
            raise ValueError(f"{num_rows} rows do not divide into {num_buckets} equal buckets")
        each, more = divmod(num_buckets, num_blocks)
        bucket = num_rows // num_buckets
        cuts = [bucket * (each * block + min(block, more)) for block in range(num_blocks + 1)]
    return list(pairwise(cuts))


def column_block(num_columns: int, min_partition: int = MIN_PARTITION) -> int:
    """Give the smallest width that cuts columns equally, as a multiple of 4 of at least a minimum.

    Args:
        num_columns: Columns of the table.
        min_partition: The smallest width allowed.

    Returns:
        The width; `num_columns` where there is none.
    """
    for width in range(max(min_partition, 1), num_columns):
        if num_columns % width == 0 and width % 4 == 0:
            return width
    return num_columns


def _equal_columns(table: str, num_columns: int, num_blocks: int) -> list[int]:
    if num_blocks < 1 or num_columns % num_blocks:
        raise ValueError(
            f"table {table!r}: {num_columns} columns do not divide into {num_blocks} equal blocks; "
            f"give size_per_rank, or another number of ranks or hosts"
        )
    return [num_columns // num_blocks] * num_blocks


def _limits(sizes: Sequence[int], total: int, what: str) -> Limits:
    """Give the limits of blocks of these sizes, which must add up."""
    if min(sizes, default=0) < 0 or sum(sizes) != total:
        raise ValueError(f"{what}: sizes {list(sizes)} must be at least 0 and add up to {total}")
    cuts = np.cumsum([0, *sizes]).tolist()
    return list(pairwise(cuts))


# ---- what the builders share


def _sharding(
    site: Site, kind: ShardingType, kernel: str | None, lines: Lines, devices: Iterable[str] = ()
) -> ParameterSharding:
    """Write blocks into the words of a plan."""
    name = site.config.name
    for device in devices:
        if device.split(":")[0] != site.device_type:
            raise ValueError(
                f"table {name!r}: device {device!r}, but the plan is for {site.device_type!r}; "
                f"slices lie on the device of their rank, so leave it out"
            )
    ranks: list[int] = lines[:, 4].tolist()
    if not all(0 <= rank < site.world_size for rank in ranks):
        raise ValueError(
            f"table {name!r}: placed on ranks {sorted(set(ranks))}, but there are ranks 0 to "
            f"{site.world_size - 1}"
        )
    places = dict.fromkeys(ranks, site.device_type)
    if site.device_type != "cpu":
        places = {
            rank: f"{site.device_type}:{local}"
            for host in site.hosts
            for local, rank in enumerate(host)
        }
    spec = EnumerableShardingSpec.from_lines(lines, [places[rank] for rank in ranks])
    return ParameterSharding(kind.value, kernel or site.compute_kernel, ranks, spec)


def _lines(rows: Limits, columns: Limits, ranks: Sequence[int]) -> Lines:
    """Pair row blocks, column blocks and ranks one to one; a single block goes with all."""
    parts = np.broadcast_arrays(
        np.array(rows, dtype=np.int64).reshape(-1, 2),
        np.array(columns, dtype=np.int64).reshape(-1, 2),
        np.array(ranks, dtype=np.int64).reshape(-1, 1),
    )
    return np.concatenate([parts[0], parts[1], parts[2][:, :1]], axis=1)


# ---- builders


def data_parallel() -> Builder:
    """Put a copy of the whole table on every rank."""

    def build(site: Site) -> ParameterSharding:
        return ParameterSharding(
            ShardingType.DATA_PARALLEL.value, site.compute_kernel, list(range(site.world_size))
        )

    return build


def table_wise(rank: int, device: str | None = None, compute_kernel: str | None = None) -> Builder:
    """Put the whole table on one rank.

    Args:
        rank: Which one.
        device: None, or the plan's device type once more.
        compute_kernel: For the plan; None looks at the table's parameter.
    """

    def build(site: Site) -> ParameterSharding:
        config = site.config
        whole = _lines([(0, config.num_embeddings)], [(0, config.embedding_dim)], [rank])
        return _sharding(
            site, ShardingType.TABLE_WISE, compute_kernel, whole, [device] if device else []
        )

    return build


def row_wise(
    sizes_placement: tuple[Sequence[int], str | Sequence[str]] | None = None,
    compute_kernel: str | None = None,
) -> Builder:
    """Put a block of rows on every rank.

    Args:
        sizes_placement: Rows of each rank, which add up to the table's, and the device type; None
            takes equal blocks, or those that keep the table's buckets whole.
        compute_kernel: For the plan; None looks at the table's parameter.
    """

    def build(site: Site) -> ParameterSharding:
        config, ranks, devices = site.config, range(site.world_size), []
        if sizes_placement is None:
            rows = split_rows(config.num_embeddings, len(ranks), config.total_num_buckets)
        else:
            sizes, device = sizes_placement
            devices = [device] if isinstance(device, str) else list(device)
            what = f"table {config.name!r}, row-wise over {len(ranks)} ranks"
            if len(sizes) != len(ranks):
                raise ValueError(f"{what}: got {len(sizes)} sizes; give one per rank")
            rows = _limits(sizes, config.num_embeddings, what)
        lines = _lines(rows, [(0, config.embedding_dim)], ranks)
        return _sharding(site, ShardingType.ROW_WISE, compute_kernel, lines, devices)

    return build


def column_wise(
    ranks: Sequence[int] | None = None,
    size_per_rank: Sequence[int] | None = None,
    compute_kernel: str | None = None,
    device_types: Sequence[str] | None = None,
) -> Builder:
    """Put blocks of columns on ranks.

    Args:
        ranks: The rank of each block; None takes the ranks in turn.
        size_per_rank: Columns of each block, which add up to the table's; None cuts equally, and
            by `column_block` where no ranks are given either.
        compute_kernel: For the plan; None looks at the table's parameter.
        device_types: None, or the plan's device type for each block.
    """

    def build(site: Site) -> ParameterSharding:
        lines = _column_lines(site, ranks, size_per_rank, range(site.world_size))
        return _sharding(site, ShardingType.COLUMN_WISE, compute_kernel, lines, device_types or [])

    return build


def _column_lines(
    site: Site,
    ranks: Sequence[int] | None,
    sizes: Sequence[int] | None,
    in_turn: Sequence[int],
) -> Lines:
    """Cut columns to sizes, or equally; `in_turn` hold the blocks where no ranks are given."""
    name, width = site.config.name, site.config.embedding_dim
    if sizes is None and ranks is None:
        block = column_block(width)
        sizes = [block] * (width // block)
    elif sizes is None:
        sizes = _equal_columns(name, width, len(ranks or ()))
    if ranks is None:
        ranks = [in_turn[block % len(in_turn)] for block in range(len(sizes))]
    if len(ranks) != len(sizes):
        raise ValueError(
            f"table {name!r}, column-wise: got {len(ranks)} ranks and {len(sizes)} sizes; give "
            f"one size per rank"
        )
    columns = _limits(sizes, width, f"table {name!r}, column-wise")
    return _lines([(0, site.config.num_embeddings)], columns, ranks)


def table_row_wise(host_index: int) -> Builder:
    """Put a block of rows on every rank of one host.

    Args:
        host_index: Which host.
    """

    def build(site: Site) -> ParameterSharding:
        lines = _row_lines(site, site.host(host_index), (0, site.config.embedding_dim))
        return _sharding(site, ShardingType.TABLE_ROW_WISE, None, lines)

    return build


def _row_lines(site: Site, ranks: Sequence[int], columns: tuple[int, int]) -> Lines:
    config = site.config
    rows = split_rows(config.num_embeddings, len(ranks), config.total_num_buckets)
    return _lines(rows, [columns], ranks)


def table_column_wise(host_index: int, size_per_rank: Sequence[int] | None = None) -> Builder:
    """Put blocks of columns on the ranks of one host, in turn.

    Args:
        host_index: Which host.
        size_per_rank: Columns of each block; None cuts by `column_block`.
    """

    def build(site: Site) -> ParameterSharding:
        lines = _column_lines(site, None, size_per_rank, site.host(host_index))
        return _sharding(site, ShardingType.TABLE_COLUMN_WISE, None, lines)

    return build


def grid_shard(host_indexes: Sequence[int]) -> Builder:
    """Put equal blocks of columns on hosts, each cut by rows over the ranks of its host.

    Args:
        host_indexes: The host of each block of columns.
    """

    def build(site: Site) -> ParameterSharding:
        width = site.config.embedding_dim
        sizes = _equal_columns(site.config.name, width, len(host_indexes))
        columns = _limits(sizes, width, f"table {site.config.name!r}")
        blocks = [
            _row_lines(site, site.host(host), block)
            for host, block in zip(host_indexes, columns, strict=True)
        ]
        return _sharding(site, ShardingType.GRID_SHARD, None, np.concatenate(blocks))

    return build


def slices(parts: Iterable[Slice]) -> Builder:
    """Put a table where slices say: hand-made, uneven, with replicas, in any tiling.

    Args:
        parts: Slices, of which a table takes its own.
    """
    parts = list(parts)

    def build(site: Site) -> ParameterSharding:
        own = [part for part in parts if part.table == site.config.name]
        return _sharding(site, ShardingType.SLICES, None, lines_of(own))

    return build


def answered(builder: Builder, answer: Answer, *, relay: bool = True) -> Builder:
    """Let a table be answered by partials or by rows, and by relay between hosts or directly.

    Args:
        builder: Where the table lies.
        answer: See `Placement`.
        relay: See `Placement`.
    """

    def build(site: Site) -> ParameterSharding:
        return replace(builder(site), answer=answer, relay=relay)

    return build
