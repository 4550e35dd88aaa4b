"""Optimizers of recommender models: updates in backward, named state, schedules, clipping."""

from shardwise.optim.clipping import (
    GradientClipping,
    GradientClippingOptimizer,
    clip_grad_norm_,
)
from shardwise.optim.in_backward import (
    TableOptimizer,
    apply_optimizer_in_backward,
    in_backward,
    in_backward_optimizer_filter,
)
from shardwise.optim.keyed import FusedOptimizer, FusedOptimizerModule, KeyedOptimizer
from shardwise.optim.placeholders import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
)
from shardwise.optim.rowwise_adagrad import RowWiseAdagrad
from shardwise.optim.scaling import GradScaler
from shardwise.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from shardwise.optim.wrappers import CombinedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "CombinedOptimizer",
    "FusedOptimizer",
    "FusedOptimizerModule",
    "GradScaler",
    "GradientClipping",
    "GradientClippingOptimizer",
    "KeyedOptimizer",
    "KeyedOptimizerWrapper",
    "LarsSGD",
    "OptimizerWrapper",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RowWiseAdagrad",
    "TableOptimizer",
    "WarmupOptimizer",
    "WarmupPolicy",
    "WarmupStage",
    "apply_optimizer_in_backward",
    "clip_grad_norm_",
    "in_backward",
    "in_backward_optimizer_filter",
]
