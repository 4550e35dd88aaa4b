"""Metrics as plain functions of predictions, labels and weights, in float64.

A label that is NaN is missing. An example without label or weight counts nothing, whatever else it
holds.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_SMALLEST = 1e-12


def prepare(
    predictions: Shaped[Tensor, "*T B"],
    labels: Shaped[Tensor, "*T B"],
    weights: Shaped[Tensor, "*T B"] | None = None,
) -> tuple[Float[Tensor, "*T B"], Float[Tensor, "*T B"], Float[Tensor, "*T B"]]:
    """Give all three in float64, and 0 where the label is missing or the weight is 0.

    Raises:
        ValueError: The shapes differ.
    """
    shapes = [list(t.shape) for t in (predictions, labels, weights) if t is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"predictions, labels and weights must have one shape, got {shapes}")
    predictions, labels = predictions.double(), labels.double()
    weights = torch.ones_like(labels) if weights is None else weights.double()
    # Not by multiplying: a prediction of NaN would stay one.
    is_absent = labels.isnan() | (weights == 0)
    absent_as_zero = [t.masked_fill(is_absent, 0.0) for t in (predictions, labels, weights)]
    return absent_as_zero[0], absent_as_zero[1], absent_as_zero[2]


def cross_entropy_sum(
    predictions: Float[Tensor, "*T B"],
    labels: Float[Tensor, "*T B"],
    weights: Float[Tensor, "*T B"],
) -> Float[Tensor, "*T"]:
    """Sum the weighted cross entropy over examples, in bits."""
    p = predictions.clamp(_SMALLEST, 1 - _SMALLEST)
    return -(weights * (labels * p.log2() + (1 - labels) * (1 - p).log2())).sum(-1)


def entropy_of_rate(
    positives: Float[Tensor, "*T"], total: Float[Tensor, "*T"]
) -> Float[Tensor, "*T"]:
    """Give the cross entropy, in bits, of predicting every label by their mean."""
    rate = (positives / total).clamp(_SMALLEST, 1 - _SMALLEST)
    return -(positives * rate.log2() + (total - positives) * (1 - rate).log2())


def normalized_entropy(
    predictions: Shaped[Tensor, "*T B"],
    labels: Shaped[Tensor, "*T B"],
    weights: Shaped[Tensor, "*T B"] | None = None,
) -> Float[Tensor, "*T"]:
    """Give the cross entropy over that of predicting the mean label; below 1 is better than it.

    X. He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014.
    """
    p, y, w = prepare(predictions, labels, weights)
    return cross_entropy_sum(p, y, w) / entropy_of_rate((w * y).sum(-1), w.sum(-1))


def log_loss(
    predictions: Shaped[Tensor, "*T B"],
    labels: Shaped[Tensor, "*T B"],
    weights: Shaped[Tensor, "*T B"] | None = None,
) -> Float[Tensor, "*T"]:
    """Give the mean cross entropy in bits."""
    p, y, w = prepare(predictions, labels, weights)
    return cross_entropy_sum(p, y, w) / w.sum(-1)


def calibration(
    predictions: Shaped[Tensor, "*T B"],
    labels: Shaped[Tensor, "*T B"],
    weights: Shaped[Tensor, "*T B"] | None = None,
) -> Float[Tensor, "*T"]:
    """Give the sum of predictions over the sum of labels; 1 is calibrated."""
    p, y, w = prepare(predictions, labels, weights)
    return (w * p).sum(-1) / (w * y).sum(-1)


def auc(
    predictions: Shaped[Tensor, "*T B"],
    labels: Shaped[Tensor, "*T B"],
    weights: Shaped[Tensor, "*T B"] | None = None,
) -> Float[Tensor, "*T"]:
    """Give the area under the ROC curve: how often a positive ranks above a negative.

    Tied predictions count half. 0.5 where a class is absent. Costs a sort.
    """
    p, y, w = prepare(predictions, labels, weights)
    if p.dim() > 1:
        rows = zip(p.flatten(0, -2), y.flatten(0, -2), w.flatten(0, -2), strict=True)
        return torch.stack([_auc(*row) for row in rows]).view(p.shape[:-1])
    return _auc(p, y, w)


def _auc(p: Tensor, y: Tensor, w: Tensor) -> Tensor:
    order = p.argsort()
    p, positive, negative = p[order], (w * y)[order], (w * (1 - y))[order]
    _, group = p.unique_consecutive(return_inverse=True)
    count = int(group[-1]) + 1 if group.numel() else 0
    positives = torch.zeros(count, dtype=p.dtype, device=p.device).index_add_(0, group, positive)
    negatives = torch.zeros(count, dtype=p.dtype, device=p.device).index_add_(0, group, negative)
    below = negatives.cumsum(0) - negatives / 2
    pairs = positives.sum() * negatives.sum()
    return torch.where(pairs > 0, (positives * below).sum() / pairs, 0.5)
