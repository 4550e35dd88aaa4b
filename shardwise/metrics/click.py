"""Metrics of tasks whose labels say whether something happened."""

import torch
from torch import Tensor

from shardwise.metrics.functional import cross_entropy, entropy_of_rate
from shardwise.metrics.metrics_config import RecTaskInfo
from shardwise.metrics.rec_metric import Examples, RecMetric, totals


class NEMetric(RecMetric):
    """Normalized entropy and log loss, both in bits."""

    namespace = "ne"
    num_sums = 3

    def statistics(self, examples: Examples) -> Tensor:
        """Sum cross entropy, positive weight and weight."""
        p, y, w = examples.predictions, examples.labels, examples.weights
        return totals(cross_entropy(p, y, w), w * y, w)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide by the entropy of the rate, and by the weight."""
        entropy, positives, total = statistics
        return {"ne": entropy / entropy_of_rate(positives, total), "logloss": entropy / total}


class SegmentedNEMetric(RecMetric):
    """Normalized entropy of each group of examples, as `segmented_ne_<group>`.

    Arguments: `num_groups`; `grouping_keys` names the output that holds the group of each example,
    from 0 to `num_groups` - 1.
    """

    namespace = "segmented_ne"
    defaults = {"num_groups": 1, "grouping_keys": "grouping_keys"}  # noqa: RUF012

    def count_sums(self) -> int:
        """Three of each group."""
        return 3 * int(self.arguments["num_groups"])

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the groups."""
        return str(self.arguments["grouping_keys"])

    def statistics(self, examples: Examples) -> Tensor:
        """Sum cross entropy, positive weight and weight by group.

        Raises:
            ValueError: A group is out of range.
        """
        groups, count = examples.named_extra().long(), int(self.arguments["num_groups"])
        groups = groups.masked_fill(examples.weights == 0, 0)
        if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(
                f"segmented_ne: groups must be from 0 to {count - 1}, got {int(groups.min())} to "
                f"{int(groups.max())}; set num_groups"
            )
        p, y, w = examples.predictions, examples.labels, examples.weights
        terms = torch.stack([cross_entropy(p, y, w), w * y, w])
        sums = terms.new_zeros(*terms.shape[:-1], count)
        sums.scatter_add_(-1, groups.expand_as(terms), terms)
        return sums.movedim(-1, 0).flatten(0, 1)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide by the entropy of the group's rate."""
        groups = statistics.unflatten(0, (-1, 3))
        return {
            f"segmented_ne_{i}": e / entropy_of_rate(y, w) for i, (e, y, w) in enumerate(groups)
        }


class CalibrationMetric(RecMetric):
    """Sum of predictions over sum of labels."""

    namespace = "calibration"

    def statistics(self, examples: Examples) -> Tensor:
        """Sum predictions and labels."""
        return totals(examples.weights * examples.predictions, examples.weights * examples.labels)


class CTRMetric(RecMetric):
    """The mean label."""

    namespace = "ctr"

    def statistics(self, examples: Examples) -> Tensor:
        """Sum labels and weights."""
        return totals(examples.weights * examples.labels, examples.weights)


class AccuracyMetric(RecMetric):
    """Weight of right decisions over all; predicted positive from `threshold` (0.5) on."""

    namespace = "accuracy"
    defaults = {"threshold": 0.5}  # noqa: RUF012

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the weights that are right, and all."""
        is_right = (examples.predictions >= self.arguments["threshold"]) == (examples.labels > 0)
        return totals(examples.weights * is_right, examples.weights)


class PrecisionMetric(RecMetric):
    """Positive part of what is predicted positive: from `threshold` (0.5) on."""

    namespace = "precision"
    defaults = {"threshold": 0.5}  # noqa: RUF012

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the true positives, and all that is predicted positive."""
        return _sum_chosen(examples, self.arguments["threshold"])


class MultiLabelPrecisionMetric(RecMetric):
    """Precision over all labels of examples that have several; outputs [examples, labels]."""

    namespace = "multi_label_precision"
    has_classes = True
    has_label_classes = True
    defaults = {"threshold": 0.5}  # noqa: RUF012

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the true positives, and all that is predicted positive."""
        return _sum_chosen(examples, self.arguments["threshold"])


class RecallMetric(RecMetric):
    """Part of the positive that is predicted so: from `threshold` (0.5) on."""

    namespace = "recall"
    defaults = {"threshold": 0.5}  # noqa: RUF012

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the true positives, and all that is positive."""
        positives = examples.weights * examples.labels
        is_chosen = examples.predictions >= self.arguments["threshold"]
        return totals(positives * is_chosen, positives)


def _sum_chosen(examples: Examples, threshold: float) -> Tensor:
    chosen = examples.weights * (examples.predictions >= threshold)
    return totals(chosen * examples.labels, chosen)
