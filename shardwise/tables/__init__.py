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
from shardwise.tables.tracking import (
    DeltaRows,
    DeltaStore,
    ModelDeltaTracker,
    ModelTrackerConfig,
    TrackingMode,
)

__all__ = [
    "BadIds",
    "DataType",
    "DeltaRows",
    "DeltaStore",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "FeatureProcessedEmbeddingBagCollection",
    "FeatureProcessorsCollection",
    "FusedEmbeddingBagCollection",
    "FusedEmbeddingCollection",
    "ModelDeltaTracker",
    "ModelTrackerConfig",
    "PoolingType",
    "PositionWeightedModule",
    "PositionWeightedModuleCollection",
    "TrackingMode",
    "fuse_embedding_optimizer",
]
