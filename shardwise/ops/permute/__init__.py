"""Permute the segments of a jagged tensor: lengths, values and weights in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from shardwise.ops.library import register
from shardwise.ops.permute import reference

__all__ = ["permute_segments"]


def _is_permutation(order: Sequence[int], num_segments: int) -> bool:
    return sorted(order) == list(range(num_segments))


def _fake(
    lengths: Tensor,
    values: Tensor,
    weights: Tensor,
    is_weighted: bool,
    num_segments: int,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    size = sum(counts[s] for s in order) if counts else values.shape[0]
    if bags:
        num_bags = sum(bags[s] for s in order)
    else:
        num_bags = lengths.shape[0] // max(num_segments, 1) * len(order)
    return (
        weights.new_empty((size if is_weighted else 0, *weights.shape[1:])),
        values.new_empty((size, *values.shape[1:])),
        lengths.new_empty(num_bags),
    )


_permute_segments = register("permute_segments", reference=reference.permute_segments, fake=_fake)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.layout = inputs[3:]


def _grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """Put the gradient of the weights back in place; what a repeated segment got is summed."""
    is_weighted, num_segments, order, bags, counts = ctx.layout
    if not is_weighted:
        grads = None
    elif _is_permutation(order, num_segments):
        (lengths,) = ctx.saved_tensors
        inverse = sorted(range(num_segments), key=order.__getitem__)
        moved = [[part[s] for s in order] if part else [] for part in (bags, counts)]
        no_weights = grad.new_empty(0)
        _, grads, _ = _permute_segments(
            lengths, grad.contiguous(), no_weights, False, num_segments, inverse, *moved
        )
    else:
        sums = [grad.new_zeros((count, *grad.shape[1:])) for count in counts]
        for s, part in zip(order, torch.split(grad, [counts[s] for s in order]), strict=True):
            sums[s] = sums[s] + part
        grads = torch.cat(sums)
    return None, None, grads, None, None, None, None, None


torch.library.register_autograd("shardwise::permute_segments", _grads, setup_context=_keep_layout)


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

    Raises:
        ValueError: `order` is not a permutation, and there are no `counts`.
        RuntimeError: The lengths do not fit the values or the weights.
    """
    if not counts and not _is_permutation(order, num_segments):
        raise ValueError(
            f"permute_segments: order {list(order)} is no permutation of {num_segments} segments; "
            f"give the counts of their values"
        )
    narrow = lengths.dtype
    if narrow not in (torch.int32, torch.int64):
        lengths = lengths.to(torch.int32)
    # The weights come first: opcheck adds up the outputs, and only floats may be added to.
    permuted = _permute_segments(
        lengths.contiguous(),
        values.contiguous(),
        values.new_empty(0) if weights is None else weights.contiguous(),
        weights is not None,
        num_segments,
        order,
        bags,
        counts,
    )
    return permuted[2].to(narrow), permuted[1], None if weights is None else permuted[0]
