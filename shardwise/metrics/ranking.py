"""Metrics of the order that predictions give: of the whole window, of sessions, of classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.metrics.functional import area_under_roc, average_precision, count_won_pairs
from shardwise.metrics.metrics_config import RecTaskInfo, SessionMetricDef
from shardwise.metrics.rec_metric import Examples, RecMetric, totals
from shardwise.metrics.sessions import (
    chance_of_top,
    discounted_gains,
    number_sessions,
    place_in_sessions,
    sort_in_sessions,
)


class AUCMetric(RecMetric):
    """Area under the ROC curve of the window; ties count half. Keeps the window: 12 B an example.

    Adding costs the batch, computing a sort: O(n log n) of the window's n examples.
    """

    namespace = "auc"
    is_raw = True

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Sort and count."""
        return {"auc": area_under_roc(*statistics)}


class AUPRCMetric(RecMetric):
    """Average precision of the window; ties are one step. Keeps the window, as AUC does."""

    namespace = "auprc"
    is_raw = True

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Sort and count."""
        return {"auprc": average_precision(*statistics)}


class GAUCMetric(RecMetric):
    """Mean AUC of the sessions with both classes, and how many these are.

    Argument: `session_key` names the output that holds session ids; a session lies in one batch.
    """

    namespace = "gauc"
    defaults = {"session_key": "session_id"}  # noqa: RUF012

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the sessions."""
        return str(self.arguments["session_key"])

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the sessions' AUC, and count them."""
        shape = examples.weights.shape
        sessions, row_sessions = number_sessions(examples.named_extra())
        num_sessions = row_sessions * shape[:-1].numel()
        columns = (examples.predictions, examples.labels, examples.weights, sessions)
        order = sort_in_sessions(columns[0].flatten(), sessions.flatten())
        p, y, w, sessions = (column.flatten()[order] for column in columns)
        won, pairs = count_won_pairs(p, w * y, w * (1 - y), sessions, num_sessions)
        areas = torch.where(pairs > 0, won / pairs, 0.0).view(*shape[:-1], row_sessions)
        return totals(areas, (pairs > 0).double().view_as(areas))

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        return {"gauc": statistics[0] / statistics[1], "gauc_num_samples": statistics[1]}


class NDCGMetric(RecMetric):
    """1 - NDCG of the sessions with a gain; ties share their places.

    A session weighs the mean weight of its examples. Arguments: `session_key` names the output that
    holds session ids (a session lies in one batch); `k`: places that count, -1 is all;
    `exponential_gain`: 2^label - 1 in place of the label; `report_ndcg_as_decreasing_curve`:
    False gives NDCG itself; `remove_single_length_sessions`.
    """

    namespace = "ndcg"
    defaults = {  # noqa: RUF012
        "session_key": "session_id",
        "k": -1,
        "exponential_gain": False,
        "report_ndcg_as_decreasing_curve": True,
        "remove_single_length_sessions": False,
    }

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the sessions."""
        return str(self.arguments["session_key"])

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the sessions' weights times NDCG, and weights."""
        shape, weights = examples.weights.shape, examples.weights
        sessions, row_sessions = number_sessions(examples.named_extra())
        kept = weights != 0
        p, y, w, s = (t[kept] for t in (examples.predictions, examples.labels, weights, sessions))
        gains = y.exp2() - 1 if self.arguments["exponential_gain"] else y
        k = self.arguments["k"] if self.arguments["k"] >= 0 else len(p)
        columns = [discounted_gains(gains, scores, s, k) for scores in (p, gains)]
        columns += [w, torch.ones_like(w)]
        sums = w.new_zeros(4, shape[:-1].numel() * row_sessions)
        found, ideal, weight, length = sums.index_add_(1, s, torch.stack(columns))
        is_judged = ideal > 0
        if self.arguments["remove_single_length_sessions"]:
            is_judged &= length > 1
        weight = torch.where(is_judged, weight / length, 0.0)
        scored = torch.where(is_judged, weight * found / ideal, 0.0)
        return totals(*(t.view(*shape[:-1], row_sessions) for t in (scored, weight)))

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        ndcg = statistics[0] / statistics[1]
        return {"ndcg": 1 - ndcg if self.arguments["report_ndcg_as_decreasing_curve"] else ndcg}


class RecallSessionMetric(RecMetric):
    """Part of the positive that is among the first `top_threshold` of its session.

    Each task needs a `session_metric_def`. A tie across the threshold counts in part: the chance
    when it is broken at random.
    """

    namespace = "recall_session_level"

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the sessions."""
        return _session_def(self.namespace, task).session_var_name

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the positives chosen, and all positives."""
        chosen, positives = _choose_in_sessions(self.namespace, self.tasks, examples)
        return totals(chosen * positives, examples.weights * positives)


class PrecisionSessionMetric(RecMetric):
    """Positive part of the first `top_threshold` of each session; tasks and ties as in recall."""

    namespace = "precision_session_level"

    def extra_name(self, task: RecTaskInfo) -> str:
        """Name the sessions."""
        return _session_def(self.namespace, task).session_var_name

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the positives chosen, and all chosen."""
        chosen, positives = _choose_in_sessions(self.namespace, self.tasks, examples)
        return totals(chosen * positives, chosen)


class MulticlassRecallMetric(RecMetric):
    """Part of the examples whose class is among the k with the highest predictions.

    Predictions are [examples, classes], labels the number of the class. Arguments: `top_k`, the
    values of k; each gives `multiclass_recall_at_<k>`. A tie across k counts in part: the chance
    when it is broken at random.
    """

    namespace = "multiclass_recall"
    has_classes = True
    defaults = {"top_k": (1,)}  # noqa: RUF012

    def count_sums(self) -> int:
        """One for each k, and the weight."""
        return len(self.arguments["top_k"]) + 1

    def statistics(self, examples: Examples) -> Tensor:
        """Sum the weights that are found within each k, and all.

        Raises:
            ValueError: A label is not a class.
        """
        p, y, w = examples.predictions, examples.labels.long().unsqueeze(-1), examples.weights
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < p.shape[-1]:
            raise ValueError(
                f"multiclass_recall: labels must be from 0 to {p.shape[-1] - 1}, got "
                f"{int(y.min())} to {int(y.max())}"
            )
        own = p.gather(-1, y)
        places = (p > own).sum(-1), (p == own).sum(-1)
        return totals(*(w * chance_of_top(*places, k) for k in self.arguments["top_k"]), w)

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Divide."""
        found = zip(self.arguments["top_k"], statistics, strict=False)
        return {f"multiclass_recall_at_{k}": hits / statistics[-1] for k, hits in found}


def _choose_in_sessions(
    namespace: str, tasks: Sequence[RecTaskInfo], examples: Examples
) -> tuple[Tensor, Tensor]:
    """Give the weight of each example that is among the first of its session, and the labels."""
    sessions, _ = number_sessions(examples.named_extra())
    chosen, labels = torch.zeros_like(examples.weights), examples.labels.clone()
    for i, task in enumerate(tasks):
        definition, kept = _session_def(namespace, task), examples.weights[i] != 0
        ranked = [(chosen[i], examples.predictions[i])]
        if definition.run_ranking_of_labels:
            ranked.append((labels[i], examples.labels[i]))
        for target, scores in ranked:
            places = place_in_sessions(scores[kept], sessions[i][kept])
            target[kept] = chance_of_top(*places, definition.top_threshold)
    return chosen * examples.weights, labels


def _session_def(namespace: str, task: RecTaskInfo) -> SessionMetricDef:
    if task.session_metric_def is None:
        raise ValueError(f"{namespace}: task {task.name!r} needs a session_metric_def")
    return task.session_metric_def
