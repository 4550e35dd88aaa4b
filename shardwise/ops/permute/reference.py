"""The definition of the segment permute, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _spans(counts: Sequence[int], order: Sequence[int], device: torch.device) -> Tensor:
    """Number the elements of the segments `order`, where segment s has `counts[s]` of them."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    spans = [torch.arange(starts[s], starts[s + 1], device=device) for s in order]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device=device)


def _per_segment(lengths: Tensor, num_segments: int, bags: Sequence[int]) -> list[int]:
    return list(bags) if bags else [lengths.numel() // max(num_segments, 1)] * num_segments


def value_positions(
    lengths: Tensor, num_segments: int, order: Sequence[int], bags: Sequence[int]
) -> Tensor:
    """Give, for each value of the result, its position in the input."""
    counts = [
        int(part.sum()) for part in torch.split(lengths, _per_segment(lengths, num_segments, bags))
    ]
    return _spans(counts, order, lengths.device)


def permute_segments(
    lengths: Tensor,
    values: Tensor,
    weights: Tensor,
    is_weighted: bool,
    num_segments: int,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the segments `order` of lengths, values and weights."""
    positions = value_positions(lengths, num_segments, order, bags)
    bag_positions = _spans(_per_segment(lengths, num_segments, bags), order, lengths.device)
    permuted = weights[positions] if is_weighted else weights.new_empty(0)
    return lengths[bag_positions], values[positions], permuted
