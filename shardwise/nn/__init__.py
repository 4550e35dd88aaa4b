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
from shardwise.nn.sampled_softmax import sampled_softmax_loss

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
    "sampled_softmax_loss",
]
