"""Dense blocks of recommender models."""

from shardwise.nn.mlp import MLP, Perceptron

__all__ = ["MLP", "Perceptron"]
