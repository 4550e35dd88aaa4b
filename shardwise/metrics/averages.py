"""Plain sums and means, of what is predicted, observed or given beside; and examples per second."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from shardwise.metrics.metrics_config import RecTaskInfo
from shardwise.metrics.rec_metric import Examples, RecMetric, totals


class AverageMetric(RecMetric):
    """Weighted means of labels and of predictions."""

    namespace = "average"
    num_sums = 3

    def statistics(self, examples: Examples) -> Tensor:
        """Sum labels, predictions and weights."""
        w = examples.weights
        return totals(w * examples.labels, w * examples.predictions, w)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        labels, predictions, total = statistics
        return {"label_average": labels / total, "prediction_average": predictions / total}


class WeightedAvgMetric(RecMetric):
    """Weighted mean of predictions."""

    namespace = "weighted_avg"

    def statistics(self, examples: Examples) -> Tensor:
        """Sum predictions and weights."""
        return totals(examples.weights * examples.predictions, examples.weights)


class ScalarMetric(RecMetric):
    """Mean of labels, unweighted: for a number of the step, such as a loss, given as a label."""

    namespace = "scalar"

    def statistics(self, examples: Examples) -> Tensor:
        """Sum and count labels."""
        return totals(examples.is_present * examples.labels, examples.is_present)


class TensorWeightedAvgMetric(RecMetric):
    """Mean of the output that a task names `tensor_name`; weighted where the task says so."""

    namespace = "tensor_weighted_avg"

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the output."""
        return _tensor_name(self.namespace, task)

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the output and weights."""
        return _sum_tensor(self.tasks, examples)


class OutputMetric(RecMetric):
    """As `TensorWeightedAvgMetric`, of the latest batch alone: `output-<task>|output`."""

    namespace = "output"
    keeps_one_batch = True

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the output."""
        return _tensor_name(self.namespace, task)

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the output and weights."""
        return _sum_tensor(self.tasks, examples)

    def name_values(
        self, values: Mapping[str, Tensor], prefixes: Sequence[str]
    ) -> dict[str, float]:
        """Give the window's, with no prefix."""
        numbers = super().name_values(values, prefixes)
        return {k.replace("|window_", "|"): v for k, v in numbers.items() if "|window_" in k}


class NumPositiveSamplesMetric(RecMetric):
    """How many examples have a label above 0."""

    namespace = "num_positive_samples"
    num_sums = 1

    def statistics(self, examples: Examples) -> Tensor:
        """Count them."""
        return totals((examples.labels > 0).double())


class NumMissingLabelsMetric(RecMetric):
    """How many labels are NaN."""

    namespace = "num_missing_labels"
    num_sums = 1

    def statistics(self, examples: Examples) -> Tensor:
        """Count them."""
        return totals(examples.is_missing.double())


class SumWeightsMetric(RecMetric):
    """Sum of weights."""

    namespace = "sum_weights"
    num_sums = 1

    def statistics(self, examples: Examples) -> Tensor:
        """Sum them."""
        return totals(examples.weights)


class WeightedSumPredictionsMetric(RecMetric):
    """Weighted sum of predictions."""

    namespace = "weighted_sum_predictions"
    num_sums = 1

    def statistics(self, examples: Examples) -> Tensor:
        """Sum them."""
        return totals(examples.weights * examples.predictions)


class TowerQPSMetric(RecMetric):
    """Examples per second that have this task's label, over all ranks; and how many they are.

    Argument: `warmup_steps`; as many updates, at least one, count neither examples nor time.
    """

    namespace = "tower_qps"
    defaults = {"warmup_steps": 100}  # noqa: RUF012
    _last: float | None = None  # when the batch before came
    _num_updates = 0

    def statistics(self, examples: Examples) -> Tensor:
        """Count examples, and the seconds since the batch before."""
        moments, num_warm = examples.moments, max(int(self.arguments["warmup_steps"]), 1)
        before = moments[0] if self._last is None else self._last
        seconds = torch.tensor([before, *moments], dtype=torch.float64).diff()
        steps = self._num_updates + torch.arange(len(moments))
        self._last, self._num_updates = moments[-1], self._num_updates + len(moments)
        counts = examples.is_present.sum(-1)
        timed = torch.stack([counts, seconds.to(counts.device).expand_as(counts)])
        return timed * (steps >= num_warm).to(counts.device)

    def reduce(
        self, statistics: Float[Tensor, "2 N"], group: dist.ProcessGroup | None
    ) -> Float[Tensor, "2 N"]:
        """Sum examples, and take the mean of seconds: ranks work side by side."""
        statistics = super().reduce(statistics, group)
        statistics[1] /= 1 if group is None else group.size()
        return statistics

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        return {"qps": statistics[0] / statistics[1], "total_examples": statistics[0]}


def _tensor_name(namespace: str, task: RecTaskInfo) -> str:
    if task.tensor_name is None:
        raise ValueError(f"{namespace}: task {task.name!r} needs a tensor_name")
    return task.tensor_name


def _sum_tensor(tasks: Sequence[RecTaskInfo], examples: Examples) -> Tensor:
    is_weighted = torch.tensor([task.weighted for task in tasks], device=examples.weights.device)
    w = torch.where(is_weighted.view(-1, 1, 1), examples.weights, examples.is_present)
    return totals(w * examples.named_extra().double().masked_fill(w == 0, 0.0), w)
