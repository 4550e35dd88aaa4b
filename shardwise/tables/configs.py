"""What a table is: its size, type, features and start."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class DataType(Enum):
    """The number format of a table's rows."""

    FP32 = "FP32"
    FP16 = "FP16"
    BF16 = "BF16"

    @property
    def dtype(self) -> torch.dtype:
        """The PyTorch dtype of the format."""
        return {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}[self.value]


class PoolingType(Enum):
    """How the rows of a bag become one vector; NONE keeps one per id."""

    SUM = "SUM"
    MEAN = "MEAN"
    NONE = "NONE"


@dataclass
class BaseEmbeddingConfig:
    """A table and the features that read it.

    Attributes:
        num_embeddings: Rows.
        embedding_dim: Columns.
        name: Unique in its collection; part of the parameter's name.
        data_type: The number format of the rows.
        feature_names: Features that read the table; none means one, named like the table.
        weight_init_max: Rows start uniform below this; default 1 / sqrt(rows).
        weight_init_min: Rows start uniform from this; default -1 / sqrt(rows).
        num_embeddings_post_pruning: Rows that serving keeps; training does not read it.
        init_fn: Fills a block of rows [n, columns] in place, in place of the uniform start. Called
            once per block of 65,536 rows, with PyTorch's random state set for that block.
        need_pos: Asks for position weights in the table. Not available: use a feature processor.
        input_dim: Ids there are before hashing, for planners; lookups do not read it.
        total_num_buckets: Buckets that row-wise placements keep whole; lookups do not read it.
        use_virtual_table: Rows that appear when first asked for. Not available.
        virtual_table_eviction_policy: Goes with virtual tables.
        enable_embedding_update: Rows written from outside by a collective. Not available.
    """

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    data_type: DataType = DataType.FP32
    feature_names: list[str] = field(default_factory=list)
    weight_init_max: float | None = None
    weight_init_min: float | None = None
    num_embeddings_post_pruning: int | None = None
    init_fn: Callable[[Tensor], Tensor | None] | None = None
    need_pos: bool = False
    input_dim: int | None = None
    total_num_buckets: int | None = None
    use_virtual_table: bool = False
    virtual_table_eviction_policy: object | None = None
    enable_embedding_update: bool = False

    def get_weight_init_max(self) -> float:
        """The upper end of the uniform start."""
        if self.weight_init_max is not None:
            return self.weight_init_max
        return 1 / math.sqrt(max(self.num_embeddings, 1))

    def get_weight_init_min(self) -> float:
        """The lower end of the uniform start."""
        if self.weight_init_min is not None:
            return self.weight_init_min
        return -1 / math.sqrt(max(self.num_embeddings, 1))

    def num_features(self) -> int:
        """Features that read the table."""
        return len(self.feature_names)


@dataclass
class EmbeddingBagConfig(BaseEmbeddingConfig):
    """A table whose bags are pooled to one vector each.

    Attributes:
        pooling: SUM or MEAN.
    """

    pooling: PoolingType = PoolingType.SUM


@dataclass
class EmbeddingConfig(BaseEmbeddingConfig):
    """A table that gives one vector per id."""


def check_config(config: BaseEmbeddingConfig) -> None:
    """Refuse a table that cannot be made.

    Raises:
        ValueError: A size, a name or an option is not possible; names the table.
    """
    name = f"table {config.name!r}"
    if not config.name or "." in config.name:
        raise ValueError(f"{name}: a table needs a name without dots")
    if config.num_embeddings < 1 or config.embedding_dim < 1:
        raise ValueError(
            f"{name}: needs at least one row and one column, got num_embeddings "
            f"{config.num_embeddings} and embedding_dim {config.embedding_dim}"
        )
    if config.get_weight_init_min() > config.get_weight_init_max():
        raise ValueError(
            f"{name}: weight_init_min {config.get_weight_init_min()} is above weight_init_max "
            f"{config.get_weight_init_max()}"
        )
    if len(set(config.feature_names)) != len(config.feature_names):
        raise ValueError(f"{name}: feature_names has a repeat: {config.feature_names}")
    if config.need_pos:
        raise ValueError(f"{name}: need_pos is not available; weight positions with a "
                         "FeatureProcessedEmbeddingBagCollection")  # fmt: skip
    for option in (
        "use_virtual_table",
        "virtual_table_eviction_policy",
        "enable_embedding_update",
    ):
        if getattr(config, option):
            raise ValueError(f"{name}: {option} is not available; leave it at its default")
