"""From a config to what a run is made of: problem, model, loss, optimizer."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from shardwise.cli.config import TrainConfig
from shardwise.cli.criteo import load_criteo
from shardwise.cli.data_config import CriteoConfig, DataConfig
from shardwise.cli.model_config import (
    DCNConfig,
    DeepFMConfig,
    DLRMConfig,
    ModelConfig,
    ProjectionConfig,
)
from shardwise.cli.movielens import load_movielens
from shardwise.cli.problem import Problem
from shardwise.data import Batch
from shardwise.models import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain, SimpleDeepFMNN
from shardwise.optim import (
    CombinedOptimizer,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    in_backward,
    in_backward_optimizer_filter,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

Loss = Callable[[Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""Gives the loss of a batch, and what metrics read."""


def load_problem(config: DataConfig) -> Problem:
    """Read the data and make samples of it."""
    if isinstance(config, CriteoConfig):
        return load_criteo(config)
    return load_movielens(config)


def build_model(config: ModelConfig, problem: Problem) -> nn.Module:
    """Make a model with the problem's tables; its start is PyTorch's default generator's."""
    bags = _build_tables(config, problem)
    num_dense = len(problem.dense_names)
    if isinstance(config, DeepFMConfig):
        return SimpleDeepFMNN(
            num_dense,
            bags,
            config.hidden_dim,
            config.deep_dim,
            per_dimension=config.pairs == "vectors",
            gives_logits=True,
        )
    widths = (bags, num_dense, list(config.dense_layers), list(config.over_layers))
    match config:
        case DLRMConfig():
            return DLRM(*widths)
        case DCNConfig():
            return DLRM_DCN(*widths, config.cross_layers, config.cross_rank)
        case ProjectionConfig():
            branches = (list(config.branch1_layers), list(config.branch2_layers))
            return DLRM_Projection(*widths, *branches)


def build_loss(model: nn.Module) -> Loss:
    """Give the mean cross-entropy of the model's chances with the labels."""
    with_loss = DLRMTrain(model)

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        mean, (_, logits, labels) = with_loss(batch)
        return mean, {"prediction": logits.sigmoid(), "label": labels}

    return loss


def build_optimizer(config: TrainConfig, model: nn.Module) -> CombinedOptimizer:
    """Give the tables row-wise Adagrad inside backward and all else Adam, keyed by parameter."""
    tables = in_backward(model, RowWiseAdagrad, lr=config.table_lr, eps=config.table_eps)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_lr),
    )
    return CombinedOptimizer([tables, dense])


def _build_tables(config: ModelConfig, problem: Problem) -> EmbeddingBagCollection:
    """Make a table for each kind of id."""
    tables = [
        EmbeddingBagConfig(
            name=table,
            feature_names=list(features),
            num_embeddings=problem.num_ids[features[0]],
            embedding_dim=config.embedding_dim,
            pooling=PoolingType[config.pooling.upper()],
        )
        for table, features in problem.tables.items()
    ]
    return EmbeddingBagCollection(tables)
