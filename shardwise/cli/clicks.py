"""Judge predictions of clicks and the like: chances of a label that is 0 or 1."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.cli.problem import Figures
from shardwise.cli.ranks import Ranks
from shardwise.data import SampleLoader, Samples
from shardwise.metrics import (
    AUCMetric,
    NEMetric,
    RecMetric,
    auc,
    calibration,
    normalized_entropy,
)

METRICS: dict[str, type[RecMetric]] = {"NE": NEMetric, "AUC": AUCMetric}
"""What is computed from the predictions of training, by the names that are shown."""

_BATCH_SIZE = 4096
"""Samples judged at once: enough to be fast, few enough for the activations to stay small."""


def score(predictions: Float[Tensor, " N"], labels: Float[Tensor, " N"]) -> Figures:
    """Score chances against what happened.

    Returns:
        AUC, the chance that a sample of label 1 has a higher prediction than one of label 0 (more
        is better); NE, log loss over that of predicting the mean of the labels (less is better);
        calibration, the sum of the predictions over the sum of the labels (1 is best).
    """
    return {
        "AUC": float(auc(predictions, labels)),
        "NE": float(normalized_entropy(predictions, labels)),
        "calibration": float(calibration(predictions, labels)),
    }


@torch.no_grad()
def judge(model: nn.Module, samples: Samples, ranks: Ranks) -> Figures:
    """Score a model's predictions; it is left in training mode if it was in it."""
    was_training = model.training
    model.eval()
    share = {"rank": ranks.rank, "num_ranks": ranks.count}
    loader = SampleLoader(samples, _BATCH_SIZE, is_shuffled=False, **share)
    judged = []
    for batch in loader:
        logits = model(batch.dense_features, batch.sparse_features).squeeze(1)
        judged.append(torch.stack([logits.sigmoid(), batch.labels], 1))
    model.train(was_training)
    return score(*ranks.gather_uneven(torch.cat(judged), "predictions of all samples").T)


def is_better(figures: Figures, than: Figures) -> bool:
    """Compare by NE, which looks at the chances themselves and not only at their order."""
    return figures["NE"] < than["NE"]
