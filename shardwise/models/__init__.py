"""Whole models."""

from shardwise.models.dlrm import (
    DLRM,
    DenseArch,
    DLRMTrain,
    InteractionArch,
    OverArch,
    SparseArch,
)

__all__ = ["DLRM", "DLRMTrain", "DenseArch", "InteractionArch", "OverArch", "SparseArch"]
