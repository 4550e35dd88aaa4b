"""Join what several keyed jagged tensors hold per key."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join_weights(names: Sequence[object], weights: Sequence[Tensor | None]) -> Tensor | None:
    """Join the weights, or give None where there are none at all.

    Raises:
        ValueError: Only some have weights; names one that has and one that has not.
    """
    present = [part for part in weights if part is not None]
    if not present:
        return None
    if len(present) < len(weights):
        have = next(n for n, part in zip(names, weights, strict=True) if part is not None)
        lack = next(n for n, part in zip(names, weights, strict=True) if part is None)
        raise ValueError(f"{have!r} has weights but {lack!r} has none; all or none must have them")
    return torch.cat(present)


def join_length_per_key(counts: Sequence[list[int] | None]) -> list[int] | None:
    """Join the counts per key if all are known."""
    known = [part for part in counts if part is not None]
    return [n for part in known for n in part] if len(known) == len(counts) else None


def join_inverse_indices(
    inverses: Sequence[tuple[list[str], Tensor] | None],
) -> tuple[list[str], Tensor] | None:
    """Join the inverse indices, or give None where there are none at all.

    Raises:
        ValueError: Only some have them, or they are for different batch sizes.
    """
    present = [inverse for inverse in inverses if inverse is not None]
    if not present:
        return None
    if len(present) < len(inverses):
        raise ValueError("concat: some tensors have inverse indices and some have not")
    batches = [indices.shape[-1] for _, indices in present]
    if any(batch != batches[0] for batch in batches):
        raise ValueError(f"concat: inverse indices must be for one batch size, got {batches}")
    return [key for keys, _ in present for key in keys], torch.cat([rows for _, rows in present])
