"""What the section `[model]` can say: one class per kind, told apart by the field `kind`."""

from dataclasses import dataclass
from typing import Literal

from shardwise.cli.checks import require, require_least


@dataclass(frozen=True, kw_only=True)
class _Towers:
    """What DLRM and its variants have in common.

    Attributes:
        kind: Which model: dlrm, dcn, projection, deepfm or, for sequences, sasrec. The other
            fields depend on it.
        embedding_dim: Columns of every embedding table.
        dense_layers: Widths of the layers over the dense features; the last is embedding_dim.
        over_layers: Widths of the layers over the interactions, two or more; the last is 1.
        pooling: How the rows of a bag become one vector.
    """

    kind: str = ""
    embedding_dim: int = 8
    dense_layers: tuple[int, ...] = (64, 8)
    over_layers: tuple[int, ...] = (64, 32, 1)
    pooling: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Check each field, and that the layers fit together."""
        require_least("model.embedding_dim", self.embedding_dim, 1)
        dim, dense, over = self.embedding_dim, self.dense_layers, self.over_layers
        is_right = bool(dense) and min(dense) >= 1 and dense[-1] == dim
        wanted = f"widths of which the last is embedding_dim, {dim}"
        require("model.dense_layers", list(dense), is_right, wanted)
        is_right = len(over) >= 2 and min(over) >= 1 and over[-1] == 1
        require("model.over_layers", list(over), is_right, "two widths or more, the last 1")


@dataclass(frozen=True, kw_only=True)
class DLRMConfig(_Towers):
    """DLRM: dot products of all pairs."""

    kind: Literal["dlrm"] = "dlrm"


@dataclass(frozen=True, kw_only=True)
class DCNConfig(_Towers):
    """DLRM with a cross net of low rank in place of the dot products.

    Attributes:
        cross_layers: Layers of the cross net.
        cross_rank: Rank of their matrices.
    """

    kind: Literal["dcn"] = "dcn"
    cross_layers: int = 2
    cross_rank: int = 8

    def __post_init__(self) -> None:
        """Check each field."""
        super().__post_init__()
        require_least("model.cross_layers", self.cross_layers, 1)
        require_least("model.cross_rank", self.cross_rank, 1)


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(_Towers):
    """DLRM with products of two learned projections in place of the dot products.

    Attributes:
        branch1_layers: Widths of the layers of one projection; the last is a multiple of
            embedding_dim.
        branch2_layers: The same of the other projection.
    """

    kind: Literal["projection"] = "projection"
    branch1_layers: tuple[int, ...] = (32,)
    branch2_layers: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        """Check each field."""
        super().__post_init__()
        wanted = f"widths of which the last is a multiple of embedding_dim, {self.embedding_dim}"
        for name in ("branch1_layers", "branch2_layers"):
            layers = getattr(self, name)
            is_right = bool(layers) and min(layers) >= 1 and layers[-1] % self.embedding_dim == 0
            require(f"model.{name}", list(layers), is_right, wanted)


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig:
    """DeepFM: a factorization machine and a deep part.

    Attributes:
        kind: Which model: dlrm, dcn, projection, deepfm or, for sequences, sasrec. The other
            fields depend on it.
        embedding_dim: Columns of every embedding table.
        hidden_dim: Width of the layer between the dense features and their vector.
        deep_dim: Columns of the deep part's result.
        pairs: What the factorization machine multiplies: the fields' vectors, as in the paper, or
            all their numbers, as in TorchRec.
        pooling: How the rows of a bag become one vector.
    """

    kind: Literal["deepfm"] = "deepfm"
    embedding_dim: int = 8
    hidden_dim: int = 32
    deep_dim: int = 16
    pairs: Literal["vectors", "scalars"] = "vectors"
    pooling: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("embedding_dim", "hidden_dim", "deep_dim"):
            require_least(f"model.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """SASRec: causal self-attention over a user's items.

    Attributes:
        kind: Which model: dlrm, dcn, projection, deepfm or, for sequences, sasrec. The other
            fields depend on it.
        embedding_dim: Columns of the tables of items and of positions.
        num_blocks: Blocks of attention and item layers.
        num_heads: Heads of attention; divides embedding_dim.
        dropout: Share of the embeddings and of each block's addends that training zeroes.
        num_negatives: Items drawn per step to compare the next ones with; 0: all items, once.
    """

    kind: Literal["sasrec"] = "sasrec"
    embedding_dim: int = 64
    num_blocks: int = 2
    num_heads: int = 2
    dropout: float = 0.5
    num_negatives: int = 1024

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("embedding_dim", "num_blocks", "num_heads"):
            require_least(f"model.{name}", getattr(self, name), 1)
        require_least("model.num_negatives", self.num_negatives, 0)
        require("model.dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and under 1")
        is_right, dim = self.embedding_dim % self.num_heads == 0, self.embedding_dim
        require("model.num_heads", self.num_heads, is_right, f"a divisor of embedding_dim, {dim}")


ModelConfig = DLRMConfig | DCNConfig | ProjectionConfig | DeepFMConfig | SASRecConfig
