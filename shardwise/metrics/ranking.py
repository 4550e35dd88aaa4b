"""The metrics of click models, each as statistics of examples and what they mean."""

import torch
from torch import Tensor

from shardwise.metrics.functional import auc, cross_entropy_sum, entropy_of_rate
from shardwise.metrics.rec_metric import RecMetric


class NEMetric(RecMetric):
    """Normalized entropy and log loss, both in bits."""

    namespace = "ne"
    num_statistics = 3

    def statistics(self, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum cross entropy, positive weight and weight."""
        entropy = cross_entropy_sum(predictions, labels, weights)
        return torch.stack([entropy, (weights * labels).sum(-1), weights.sum(-1)])

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide by the entropy of the rate, and by the weight."""
        entropy, positives, total = statistics
        return {"ne": entropy / entropy_of_rate(positives, total), "logloss": entropy / total}


class CalibrationMetric(RecMetric):
    """Sum of predictions over sum of labels."""

    namespace = "calibration"
    num_statistics = 2

    def statistics(self, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum predictions and labels."""
        return torch.stack([(weights * predictions).sum(-1), (weights * labels).sum(-1)])

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        return {"calibration": statistics[0] / statistics[1]}


class CTRMetric(RecMetric):
    """The mean label."""

    namespace = "ctr"
    num_statistics = 2

    def statistics(self, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum labels and weights."""
        return torch.stack([(weights * labels).sum(-1), weights.sum(-1)])

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        return {"ctr": statistics[0] / statistics[1]}


class AUCMetric(RecMetric):
    """Area under the ROC curve of the window; ties count half."""

    namespace = "auc"
    num_statistics = 3
    is_raw = True

    def statistics(self, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Keep the examples, in float32."""
        return torch.stack([predictions, labels, weights])

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Sort and count, task by task."""
        return {"auc": auc(*statistics)}
