"""Metrics of tasks whose labels are numbers."""

import torch
from torch import Tensor

from shardwise.metrics.functional import count_ordered_pairs
from shardwise.metrics.rec_metric import Examples, RecMetric, totals


class MSEMetric(RecMetric):
    """Mean squared error, its root, and R²: 1 - error over that of predicting the mean label."""

    namespace = "mse"
    num_sums = 4

    def statistics(self, examples: Examples) -> Tensor:
        """Sum squared errors, labels, squared labels and weights."""
        return _sum_squares(examples)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        mse = statistics[0] / statistics[3]
        return {"mse": mse, "rmse": mse.sqrt(), "r_squared": 1 - _over_variance(statistics)}


class NMSEMetric(RecMetric):
    """Squared error over that of predicting the mean label, and its root; 1 - R²."""

    namespace = "nmse"
    num_sums = 4

    def statistics(self, examples: Examples) -> Tensor:
        """Sum squared errors, labels, squared labels and weights."""
        return _sum_squares(examples)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        nmse = _over_variance(statistics)
        return {"nmse": nmse, "nrmse": nmse.sqrt()}


class MAEMetric(RecMetric):
    """Mean absolute error."""

    namespace = "mae"

    def statistics(self, examples: Examples) -> Tensor:
        """Sum absolute errors and weights."""
        error = (examples.predictions - examples.labels).abs()
        return totals(examples.weights * error, examples.weights)


class XAUCMetric(RecMetric):
    """Part of the pairs of one batch, of those whose labels differ, that are ordered right."""

    namespace = "xauc"

    def statistics(self, examples: Examples) -> Tensor:
        """Weigh the pairs ordered right, and all."""
        pairs = count_ordered_pairs(examples.predictions, examples.labels, examples.weights)
        return torch.stack(pairs)


def _sum_squares(examples: Examples) -> Tensor:
    p, y, w = examples.predictions, examples.labels, examples.weights
    return totals(w * (p - y).square(), w * y, w * y.square(), w)


def _over_variance(statistics: Tensor) -> Tensor:
    return statistics[0] / (statistics[2] - statistics[1].square() / statistics[3])
