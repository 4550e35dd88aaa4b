"""Arithmetic of the key-major layout, on Python integers and on the lengths tensor alone.

With F keys, key f has `stride_per_key[f]` lengths, laid out key after key; when every key has the
same batch (no variable stride) that is B for each.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Integer
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prefix_sums(counts: Sequence[int]) -> list[int]:
    """Give the running totals of `counts`, from 0 on: one more than there are counts."""
    return list(accumulate(counts, initial=0))


def as_integers(owner: str, name: str, tensor: Tensor | None) -> Tensor | None:
    """Give lengths or offsets as they are; empty ones, which torch makes float, as int64.

    Raises:
        TypeError: They are not of an integer dtype.
    """
    if tensor is None or tensor.dtype in _INTEGERS:
        return tensor
    if tensor.numel() == 0:
        return tensor.to(torch.int64)
    raise TypeError(f"{owner}: {name} must be of an integer dtype, got {tensor.dtype}")


def lengths_from_offsets(offsets: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
    """Give the differences of neighbours; no offsets at all give no lengths."""
    return offsets[1:] - offsets[:-1]


def values_per_key(
    lengths: Integer[Tensor, "..."], num_keys: int, stride_per_key: Sequence[int] | None
) -> list[int]:
    """Count the values of each key; on an accelerator this waits for the device.

    Args:
        lengths: Of all keys, key after key.
        num_keys: F.
        stride_per_key: Lengths per key, where the keys differ; None where all have as many.
    """
    if num_keys == 0:
        return []
    if stride_per_key is None:
        counts = lengths.reshape(num_keys, -1).sum(1)
    else:
        parts = torch.split(lengths.reshape(-1), list(stride_per_key))
        counts = torch.stack([part.sum() for part in parts])
    result: list[int] = counts.tolist()
    return result


def segment_sums(counts: Sequence[int], segments: Sequence[int]) -> list[int]:
    """Add up `counts` over consecutive segments of `segments[i]` entries; an empty one gives 0."""
    bounds = prefix_sums(segments)
    return [sum(counts[start:end]) for start, end in pairwise(bounds)]


def feature_major(num_keys: int, num_ranks: int, stagger: int) -> list[int]:
    """Order [rank][key] segments as [key][rank].

    Args:
        num_keys: Keys per rank.
        num_ranks: Ranks that sent a segment of each key.
        stagger: Ranks of one key are visited with this many interleaved groups: 1 keeps their
            order, `s` visits 0, W/s, 2W/s, … then 1, W/s + 1, …

    Returns:
        For each place of the result the number of the segment that goes there.
    """
    step = num_ranks // stagger
    ranks = [rank + step * group for rank in range(step) for group in range(stagger)]
    return [rank * num_keys + key for key in range(num_keys) for rank in ranks]
