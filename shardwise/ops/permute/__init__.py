"""Permute the segments of a jagged tensor: lengths, values and weights in one operator."""

from collections.abc import Sequence

from jaxtyping import Integer, Shaped
from torch import Tensor

from shardwise.ops.permute import reference

__all__ = ["permute_segments"]


def permute_segments(
    lengths: Integer[Tensor, " N"],
    values: Shaped[Tensor, " V *rest"],
    weights: Shaped[Tensor, " V *more"] | None,
    num_segments: int,
    order: Sequence[int],
    *,
    bags: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> tuple[Integer[Tensor, " M"], Shaped[Tensor, " U *rest"], Shaped[Tensor, " U *more"] | None]:
    """Copy segments into another order; they may repeat and be left out.

    A segment is a run of bags: of `bags[s]` of them, or of as many for each. Differentiable in
    `weights`, where a repeated segment's gradients are summed.

    Args:
        lengths: Values per bag.
        values: The values, bag after bag.
        weights: One per value, or None.
        num_segments: How many segments the input has.
        order: Numbers of the segments to copy, in [0, num_segments).
        bags: Bags per segment; empty where all have as many.
        counts: Values per segment, where known. They must be given when `order` is not a
            permutation, for they tell the size of the result.

    Returns:
        Lengths, values and weights of the result.
    """
    permuted = reference.permute_segments(
        lengths,
        values,
        values.new_empty(0) if weights is None else weights,
        weights is not None,
        num_segments,
        list(order),
        list(bags),
        list(counts),
    )
    return permuted[0], permuted[1], None if weights is None else permuted[2]
