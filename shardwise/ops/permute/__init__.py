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


def _is_known(counts: Sequence[int]) -> bool:
    # No empty list stands for unknown counts: AOTInductor packages an empty list as None.
    return not (len(counts) > 0 and isinstance(counts[0], int) and counts[0] == -1)


def _fake(
    lengths: Tensor,
    values: Tensor,
    weights: Tensor,
    is_weighted: bool,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    size = sum(counts[s] for s in order) if _is_known(counts) else values.shape[0]
    return (
        weights.new_empty((size if is_weighted else 0, *weights.shape[1:])),
        values.new_empty((size, *values.shape[1:])),
        lengths.new_empty(sum(bags[s] for s in order)),
    )


_permute_segments = register("permute_segments", reference=reference.permute_segments, fake=_fake)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.layout = inputs[3:]


def _grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """Put the gradient of the weights back in place; what a repeated segment got is summed."""
    is_weighted, order, bags, counts = ctx.layout
    if not is_weighted:
        grads = None
    elif _is_permutation(order, len(bags)):
        (lengths,) = ctx.saved_tensors
        inverse = sorted(range(len(bags)), key=order.__getitem__)
        moved = [[part[s] for s in order] for part in (bags, counts)]
        no_weights = grad.new_empty(0)
        _, grads, _ = _permute_segments(
            lengths, grad.contiguous(), no_weights, False, inverse, *moved
        )
    else:
        sums = [grad.new_zeros((count, *grad.shape[1:])) for count in counts]
        for s, part in zip(order, torch.split(grad, [counts[s] for s in order]), strict=True):
            sums[s] = sums[s] + part
        grads = torch.cat(sums)
    return None, None, grads, None, None, None, None


torch.library.register_autograd("shardwise::permute_segments", _grads, setup_context=_keep_layout)


def permute_segments(
    lengths: Integer[Tensor, " N"],
    values: Shaped[Tensor, " V *rest"],
    weights: Shaped[Tensor, " V *more"] | None,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int] | None = None,
) -> tuple[Integer[Tensor, " M"], Shaped[Tensor, " U *rest"], Shaped[Tensor, " U *more"] | None]:
    """Copy segments into another order; they may repeat and be left out.

    Segment s is a run of `bags[s]` bags. Differentiable in `weights`, where the gradients of a
    repeated segment are summed.

    Args:
        lengths: Values per bag.
        values: The values, bag after bag.
        weights: One per value, or None.
        order: Numbers of the segments to copy.
        bags: Bags per segment.
        counts: Values per segment, where known. They must be given when `order` is not a
            permutation, for they tell the size of the result.

    Returns:
        Lengths, values and weights of the result.

    Raises:
        ValueError: `order` is not a permutation, and there are no `counts`.
        RuntimeError: The lengths do not fit the values or the weights.
    """
    if counts is None and not _is_permutation(order, len(bags)):
        raise ValueError(
            f"permute_segments: order {list(order)} is no permutation of {len(bags)} segments; "
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
        order,
        bags,
        [-1] * len(bags) if counts is None else counts,
    )
    return permuted[2].to(narrow), permuted[1], None if weights is None else permuted[0]
