"""From a config to what a run is made of: samples, model, optimizer."""

import torch

from shardwise.cli.config import DataConfig, ModelConfig, TrainConfig
from shardwise.data.movielens import MovieLens, read_movielens
from shardwise.data.movielens_samples import TABLES, MovieLensSamples, build_samples
from shardwise.models import DLRM
from shardwise.optim import (
    CombinedOptimizer,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    in_backward,
    in_backward_optimizer_filter,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType


def load_data(config: DataConfig) -> tuple[MovieLens, MovieLensSamples]:
    """Read the edition and make samples of it."""
    data = read_movielens(config.root or None, config.edition)
    samples = build_samples(
        data,
        train_fraction=config.train_fraction,
        history_length=config.history_length,
        max_tags=config.max_tags,
    )
    return data, samples


def build_model(config: ModelConfig, samples: MovieLensSamples) -> DLRM:
    """Make a DLRM with a table for each kind of id; its start is PyTorch's default generator's."""
    tables = [
        EmbeddingBagConfig(
            name=table,
            feature_names=list(features),
            num_embeddings=samples.num_ids[features[0]],
            embedding_dim=config.embedding_dim,
            pooling=PoolingType[config.pooling.upper()],
        )
        for table, features in TABLES.items()
    ]
    return DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables),
        dense_in_features=len(samples.dense_names),
        dense_arch_layer_sizes=list(config.dense_layers),
        over_arch_layer_sizes=list(config.over_layers),
    )


def build_optimizer(config: TrainConfig, model: DLRM) -> CombinedOptimizer:
    """Give the tables row-wise Adagrad inside backward and all else Adam, keyed by parameter."""
    tables = in_backward(model, RowWiseAdagrad, lr=config.table_lr, eps=config.table_eps)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_lr),
    )
    return CombinedOptimizer([tables, dense])
