"""Metrics of ranking models: over a window and a lifetime, per task, over ranks."""

from shardwise.metrics.functional import auc, calibration, log_loss, normalized_entropy
from shardwise.metrics.metric_module import RecMetricModule
from shardwise.metrics.ranking import AUCMetric, CalibrationMetric, CTRMetric, NEMetric
from shardwise.metrics.rec_metric import RecMetric, RecTaskInfo

__all__ = [
    "AUCMetric",
    "CTRMetric",
    "CalibrationMetric",
    "NEMetric",
    "RecMetric",
    "RecMetricModule",
    "RecTaskInfo",
    "auc",
    "calibration",
    "log_loss",
    "normalized_entropy",
]
