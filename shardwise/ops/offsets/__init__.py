"""Offsets from lengths: where each bag starts, and where the last one ends."""

import torch
from jaxtyping import Integer
from torch import Tensor

from shardwise.ops.offsets import reference

__all__ = ["offsets_from_lengths"]


def offsets_from_lengths(lengths: Integer[Tensor, "..."]) -> Integer[Tensor, " P"]:
    """Give the start of each bag and the end of the last one.

    Nothing is checked: a negative length gives decreasing offsets.

    Args:
        lengths: Ids per bag, of any shape, read in order.

    Returns:
        One more entry than there are lengths, starting at 0. int32 lengths give int32 offsets,
        all other integers int64.
    """
    if lengths.dtype not in (torch.int32, torch.int64):
        lengths = lengths.to(torch.int64)
    return reference.offsets_from_lengths(lengths)
