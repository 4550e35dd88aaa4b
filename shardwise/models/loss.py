"""What scored batches are trained by: labels and the binary cross-entropy of logits with them."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Num
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor

LossAndScores = tuple[
    Float[Tensor, ""], tuple[Float[Tensor, ""], Float[Tensor, "..."], Num[Tensor, "..."]]
]
"""The loss, and (loss, logits, labels) without gradient."""


@runtime_checkable
class LabeledBatch(Protocol):
    """What a training step takes in: a `shardwise.data.Batch`, or anything like it."""

    @property
    def dense_features(self) -> Tensor:
        """One row of numbers per sample."""

    @property
    def sparse_features(self) -> KeyedJaggedTensor:
        """One bag per key and sample."""

    @property
    def labels(self) -> Tensor:
        """One per sample, or one row of them."""


def binary_loss(
    name: str, logits: Float[Tensor, "..."], labels: Num[Tensor, "..."]
) -> LossAndScores:
    """Give the mean cross-entropy of logits with labels in [0, 1].

    Args:
        name: Who asks, for the message.
        logits: What was predicted.
        labels: What was seen, of the same shape.

    Returns:
        The loss, and (loss, logits, labels) without gradient.

    Raises:
        ValueError: The labels have another shape than the logits.
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"{name}: labels have shape {list(labels.shape)}, logits {list(logits.shape)}; "
            f"give one label per logit"
        )
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return loss, (loss.detach(), logits.detach(), labels.detach())
