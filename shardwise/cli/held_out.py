"""Judge predictions on the held-out ratings, and show a model beside the two simple predictions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.data import SampleLoader, Samples
from shardwise.data.movielens import MovieLens
from shardwise.data.movielens_baselines import smoothed_item_rate, user_and_item_rate
from shardwise.metrics import auc, calibration, normalized_entropy

_BATCH_SIZE = 4096
"""Samples judged at once: enough to be fast, few enough for the activations to stay small."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good predictions are.

    Attributes:
        auc: Chance that a liked rating has a higher prediction than another; more is better.
        ne: Log loss over that of predicting the mean of the labels; less is better.
        calibration: Sum of the predictions over the sum of the labels; 1 is best.
    """

    auc: float
    ne: float
    calibration: float

    def figures(self) -> dict[str, float]:
        """Give the figures by the names that are shown."""
        return {"AUC": self.auc, "NE": self.ne, "calibration": self.calibration}

    def __str__(self) -> str:
        """Show the figures in a line."""
        return ", ".join(f"{name} {value:.4f}" for name, value in self.figures().items())


def score(predictions: Float[Tensor, " N"], labels: Float[Tensor, " N"]) -> Scores:
    """Score chances against what happened."""
    return Scores(
        auc=float(auc(predictions, labels)),
        ne=float(normalized_entropy(predictions, labels)),
        calibration=float(calibration(predictions, labels)),
    )


@torch.no_grad()
def judge(model: nn.Module, samples: Samples) -> Scores:
    """Score a model's predictions; it is left in training mode if it was in it."""
    was_training = model.training
    model.eval()
    loader = SampleLoader(samples, _BATCH_SIZE, is_shuffled=False)
    logits = [model(batch.dense_features, batch.sparse_features) for batch in loader]
    model.train(was_training)
    return score(torch.cat(logits).squeeze(1).sigmoid(), samples.labels)


def compare(scores: Scores, data: MovieLens, test: Samples, train_fraction: float) -> str:
    """Show a model's scores beside those of the simple predictions of the same ratings.

    Args:
        scores: The model's.
        data: The edition.
        test: Its held-out samples, in time order.
        train_fraction: Where the edition was cut.
    """
    simple = {
        "user rate and item rate": user_and_item_rate(data, train_fraction=train_fraction),
        "smoothed item rate": smoothed_item_rate(data, train_fraction=train_fraction),
    }
    rows = {name: score(torch.from_numpy(p), test.labels) for name, p in simple.items()}
    return f"{len(test):,} ratings held out:\n{_table({'model': scores} | rows)}"


def _table(rows: Mapping[str, Scores]) -> str:
    """Line up one row of figures per name."""
    width = max(map(len, rows))
    columns = next(iter(rows.values())).figures()
    lines = [" ".join([" " * width, *(f"{name:>11}" for name in columns)])]
    for name, scores in rows.items():
        figures = (f"{value:11.4f}" for value in scores.figures().values())
        lines.append(" ".join([f"{name:<{width}}", *figures]))
    return "\n".join(lines)
