"""Metrics of ranking models: over a window and a lifetime, per task, over ranks."""

from shardwise.metrics.functional import auc, calibration, log_loss, normalized_entropy
from shardwise.metrics.metric_module import RecMetricModule
from shardwise.metrics.ranking import AUCMetric, CalibrationMetric, CTRMetric, NEMetric
from shardwise.metrics.rec_metric import RecMetric, RecTaskInfo
from shardwise.metrics.retrieval import (
    RetrievalMetrics,
    hit_rate_at,
    ndcg_at,
    rank_relevant,
    recall_at,
    reciprocal_rank,
)

__all__ = [
    "AUCMetric",
    "CTRMetric",
    "CalibrationMetric",
    "NEMetric",
    "RecMetric",
    "RecMetricModule",
    "RecTaskInfo",
    "RetrievalMetrics",
    "auc",
    "calibration",
    "hit_rate_at",
    "log_loss",
    "ndcg_at",
    "normalized_entropy",
    "rank_relevant",
    "recall_at",
    "reciprocal_rank",
]
