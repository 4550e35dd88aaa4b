"""Whole models."""

from shardwise.models.deepfm import FMInteractionArch, SimpleDeepFMNN
from shardwise.models.dlrm import (
    DLRM,
    DenseArch,
    DLRMTrain,
    InteractionArch,
    OverArch,
    SparseArch,
)
from shardwise.models.dlrm_variants import (
    DLRM_DCN,
    DLRM_Projection,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from shardwise.models.retrieval import ExactIndex, FaissIndex, TwoTowerRetrieval
from shardwise.models.sasrec import SASRec, SASRecTrain
from shardwise.models.two_tower import TwoTower, TwoTowerTrainTask

__all__ = [
    "DLRM",
    "DLRM_DCN",
    "DLRMTrain",
    "DLRM_Projection",
    "DenseArch",
    "ExactIndex",
    "FMInteractionArch",
    "FaissIndex",
    "InteractionArch",
    "InteractionDCNArch",
    "InteractionProjectionArch",
    "OverArch",
    "SASRec",
    "SASRecTrain",
    "SimpleDeepFMNN",
    "SparseArch",
    "TwoTower",
    "TwoTowerRetrieval",
    "TwoTowerTrainTask",
]
