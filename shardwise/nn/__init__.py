"""Dense blocks of recommender models."""

from shardwise.nn.activation import SwishLayerNorm
from shardwise.nn.crossnet import (
    CrossNet,
    LowRankCrossNet,
    LowRankMixtureCrossNet,
    VectorCrossNet,
)
from shardwise.nn.deepfm import DeepFM, FactorizationMachine
from shardwise.nn.mlp import MLP, Perceptron
from shardwise.nn.regroup import KTRegroupAsDict

__all__ = [
    "MLP",
    "CrossNet",
    "DeepFM",
    "FactorizationMachine",
    "KTRegroupAsDict",
    "LowRankCrossNet",
    "LowRankMixtureCrossNet",
    "Perceptron",
    "SwishLayerNorm",
    "VectorCrossNet",
]
