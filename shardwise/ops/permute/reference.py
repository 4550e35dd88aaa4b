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


def permute_segments(
    lengths: Tensor,
    values: Tensor,
    weights: Tensor,
    is_weighted: bool,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the segments `order`; give weights, values and lengths.

    One positive number of `bags` holds for all segments; -1 among `counts` leaves all to be found.
    """
    if len(bags) == 1 and bags[0] > 0:
        bags = [bags[0]] * (lengths.numel() // bags[0])
    if -1 in counts:
        counts = [int(part.sum()) for part in torch.split(lengths, list(bags))]
    positions = _spans(counts, order, values.device)
    bag_positions = _spans(bags, order, values.device)
    permuted = weights[positions] if is_weighted else weights.new_empty(0)
    return permuted, values[positions], lengths[bag_positions]
