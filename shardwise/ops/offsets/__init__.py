"""Offsets from lengths: where each bag starts, and where the last one ends."""

import torch
from jaxtyping import Integer
from torch import Tensor

from shardwise.ops.library import register
from shardwise.ops.offsets import reference

__all__ = ["offsets_from_lengths"]


def _fake(lengths: Tensor) -> Tensor:
    return lengths.new_empty(lengths.numel() + 1)


_offsets_from_lengths = register(
    "offsets_from_lengths", reference=reference.offsets_from_lengths, fake=_fake
)


def offsets_from_lengths(lengths: Integer[Tensor, "..."]) -> Integer[Tensor, " P"]:
    """Give the start of each bag and the end of the last one.

    Nothing is checked: a negative length gives decreasing offsets.

    Args:
        lengths: Ids per bag, of any shape, read in order.

    Returns:
        One more entry than there are lengths, starting at 0. int32 lengths give int32 offsets,
        all other integers int64.
    """
    if lengths.dtype != torch.int32:
        lengths = lengths.to(torch.int64)
    offsets: Tensor = _offsets_from_lengths(lengths.reshape(-1).contiguous())
    return offsets
