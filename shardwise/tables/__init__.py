"""Embedding tables: their configs, and collections that look many of them up in one call."""

from shardwise.ops.lookup import BadIds
from shardwise.tables.configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from shardwise.tables.embedding_bag_collection import EmbeddingBagCollection
from shardwise.tables.embedding_collection import EmbeddingCollection
from shardwise.tables.feature_processors import (
    FeatureProcessedEmbeddingBagCollection,
    FeatureProcessorsCollection,
    PositionWeightedModule,
    PositionWeightedModuleCollection,
)
from shardwise.tables.fused import (
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
    fuse_embedding_optimizer,
)

__all__ = [
    "BadIds",
    "DataType",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "FeatureProcessedEmbeddingBagCollection",
    "FeatureProcessorsCollection",
    "FusedEmbeddingBagCollection",
    "FusedEmbeddingCollection",
    "PoolingType",
    "PositionWeightedModule",
    "PositionWeightedModuleCollection",
    "fuse_embedding_optimizer",
]
