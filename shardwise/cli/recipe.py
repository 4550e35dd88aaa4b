"""From a config to what a run is made of: problem, model, loss, optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.cli.config import TrainConfig
from shardwise.cli.criteo import load_criteo
from shardwise.cli.data_config import CriteoConfig, DataConfig, SequencesConfig
from shardwise.cli.model_config import (
    DCNConfig,
    DeepFMConfig,
    DLRMConfig,
    ModelConfig,
    ProjectionConfig,
    SASRecConfig,
)
from shardwise.cli.movielens import load_movielens
from shardwise.cli.next_items import load_sequences
from shardwise.cli.problem import Problem
from shardwise.data import Batch, SequenceBatch
from shardwise.models import (
    DLRM,
    DLRM_DCN,
    DLRM_Projection,
    DLRMTrain,
    SASRec,
    SASRecTrain,
    SimpleDeepFMNN,
)
from shardwise.optim import (
    Adam,
    CombinedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    TableOptimizer,
    WarmupOptimizer,
    WarmupPolicy,
    WarmupStage,
    in_backward,
    in_backward_optimizer_filter,
)
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    PoolingType,
)

Loss = Callable[[Any], tuple[Tensor, Mapping[str, Tensor], int]]
"""Gives the loss of a batch, what metrics read, and how many numbers the loss is the mean of."""

_OfBags = DLRMConfig | DCNConfig | ProjectionConfig | DeepFMConfig


def load_problem(config: DataConfig) -> Problem:
    """Read the data and make samples of it."""
    if isinstance(config, CriteoConfig):
        return load_criteo(config)
    if isinstance(config, SequencesConfig):
        return load_sequences(config)
    return load_movielens(config)


def build_model(config: ModelConfig, problem: Problem) -> nn.Module:
    """Make a model with the problem's tables; its start is PyTorch's default generator's."""
    if isinstance(config, SASRecConfig):
        return _build_sasrec(config, problem)
    bags = _build_bags(config, problem)
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


def add_loss(config: ModelConfig, model: nn.Module) -> nn.Module:
    """Add what training makes smaller: of clicks the cross-entropy, of items the softmax loss."""
    if isinstance(config, SASRecConfig):
        assert isinstance(model, SASRec), f"{type(model).__name__} is not what the config says"
        return SASRecTrain(model, config.num_negatives or None)
    return DLRMTrain(model)


def check_batch(batch: Batch | SequenceBatch, problem: Problem) -> None:
    """Refuse a damaged batch by a `ValueError`."""
    if isinstance(batch, Batch):
        batch.validate(problem.dense_names)
    else:
        batch.features.validate()


def build_loss(config: ModelConfig, with_loss: nn.Module) -> Loss:
    """Give a function that runs what `add_loss` gave, by itself or wrapped, on a batch."""

    def of_clicks(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor], int]:
        mean, (_, logits, labels) = with_loss(batch)
        return mean, {"prediction": logits.sigmoid(), "label": labels}, len(labels)

    def of_items(batch: SequenceBatch) -> tuple[Tensor, Mapping[str, Tensor], int]:
        mean, _ = with_loss(batch.features, batch.targets)
        return mean, {}, len(batch.targets)

    return of_items if isinstance(config, SASRecConfig) else of_clicks


def bind_tables(config: TrainConfig, model: nn.Module) -> TableOptimizer:
    """Give the tables their rule inside backward."""
    rule = {"rowwise_adagrad": RowWiseAdagrad, "adam": Adam}[config.table_rule]
    return in_backward(model, rule, lr=config.table_lr, eps=config.table_eps)


def build_optimizer(
    config: TrainConfig, model: nn.Module, tables: TableOptimizer, num_steps: int
) -> CombinedOptimizer:
    """Give all that is no table Adam, and join it with the rule of the tables.

    Args:
        config: Rates.
        model: What to train.
        tables: What `bind_tables` gave.
        num_steps: How many there will be, for rates that fall.
    """
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_lr),
    )
    if not config.lr_falls:
        return CombinedOptimizer([tables, dense])
    fall = [WarmupStage(WarmupPolicy.POLY, max_iters=num_steps)]
    rates: list[tuple[str, KeyedOptimizer, float]] = [
        ("__table_lr", tables, config.table_lr),
        ("__dense_lr", dense, config.dense_lr),
    ]
    return CombinedOptimizer(
        [WarmupOptimizer(part, fall, lr=lr, param_name=name) for name, part, lr in rates]
    )


def _build_bags(config: _OfBags, problem: Problem) -> EmbeddingBagCollection:
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


def _build_sasrec(config: SASRecConfig, problem: Problem) -> SASRec:
    """Make tables of items and of positions, which start normal with deviation 0.02."""
    tables = [
        EmbeddingConfig(
            name=table,
            feature_names=list(features),
            num_embeddings=problem.num_ids[features[0]],
            embedding_dim=config.embedding_dim,
            init_fn=lambda rows: rows.normal_(0, 0.02),
        )
        for table, features in problem.tables.items()
    ]
    collection = EmbeddingCollection(tables)
    return SASRec(collection, config.num_blocks, config.num_heads, config.dropout)
