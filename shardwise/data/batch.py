"""`Batch`: what a recommender model takes in one step, and its check at the door."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils import _pytree as pytree

from shardwise.jagged import KeyedJaggedTensor, Pipelineable


@dataclass
class Batch(Pipelineable):
    """Dense features, bags of ids and labels of the same B samples.

    A pytree node: its fields are the children.

    Attributes:
        dense_features: One row per sample.
        sparse_features: One bag per key and sample.
        labels: One, or one row of several, per sample.
    """

    dense_features: Num[Tensor, "B dense"]
    sparse_features: KeyedJaggedTensor
    labels: Num[Tensor, "..."]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy to a device; what lies there already is shared."""
        return Batch(
            dense_features=self.dense_features.to(device=device, non_blocking=non_blocking),
            sparse_features=self.sparse_features.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work queued on `stream` is done."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU can copy in the background."""
        return Batch(
            dense_features=self.dense_features.pin_memory(),
            sparse_features=self.sparse_features.pin_memory(),
            labels=self.labels.pin_memory(),
        )

    def validate(self, dense_names: Sequence[str] | None = None) -> None:
        """Check that the parts speak of the same samples and that all numbers are finite.

        Costs a pass over the data, and a wait for the device if it is on one.

        Args:
            dense_names: What the dense columns are called, for the message.

        Raises:
            ValueError: The numbers of samples differ, a dense feature or a label is NaN or
                infinite, or the sparse features do not hold together.
        """
        rows = (len(self.dense_features), self.sparse_features.stride(), len(self.labels))
        if len(set(rows)) > 1:
            raise ValueError(
                f"Batch: dense_features have {rows[0]} samples, sparse_features {rows[1]} and "
                f"labels {rows[2]}; all must have the same number"
            )
        _check_finite("dense_features", self.dense_features, dense_names)
        _check_finite("labels", self.labels, None)
        self.sparse_features.validate()


def _check_finite(field: str, numbers: Num[Tensor, "..."], names: Sequence[str] | None) -> None:
    """Raise at the first number that is NaN or infinite."""
    bad = (~torch.isfinite(numbers)).nonzero()
    if len(bad) == 0:
        return
    sample, *column = bad[0].tolist()
    place = f", column {column[0]}" if column else ""
    name = f" ({names[column[0]]!r})" if column and names else ""
    found = numbers[tuple(bad[0])].item()
    raise ValueError(
        f"Batch: {field}, sample {sample}{place}{name} is {found}; every number must be finite, "
        "so fill in missing ones before"
    )


def _flatten(batch: Batch) -> tuple[list[object], None]:
    return [batch.dense_features, batch.sparse_features, batch.labels], None


def _unflatten(fields: Iterable[Any], context: None) -> Batch:
    # Tree maps put anything in place of a field, which a checked constructor would refuse.
    batch = object.__new__(Batch)
    batch.dense_features, batch.sparse_features, batch.labels = fields
    return batch


pytree.register_pytree_node(
    Batch, _flatten, _unflatten, serialized_type_name="shardwise.data.Batch"
)
