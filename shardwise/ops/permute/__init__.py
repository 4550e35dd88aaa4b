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


def _pack(bags: Sequence[int], counts: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Give both as the operator takes them: one number for all where it says as much.

    A long list costs more than what it describes. Unknown counts are -1; no empty list stands for
    them, since AOTInductor packages it as None.
    """
    is_alike = len(bags) > 0 and all(type(count) is int for count in (bags[0], bags[-1]))
    if is_alike and bags[0] > 0 and list(bags).count(bags[0]) == len(bags):
        bags = bags[:1]
    return list(bags), [-1] if counts is None else list(counts)


def _fake(
    lengths: Tensor,
    values: Tensor,
    weights: Tensor,
    is_weighted: bool,
    order: Sequence[int],
    bags: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    is_known = not (len(counts) > 0 and isinstance(counts[0], int) and counts[0] == -1)
    size = sum(counts[s] for s in order) if is_known else values.shape[0]
    num_bags = bags[0] * len(order) if len(bags) == 1 else sum(bags[s] for s in order)
    return (
        weights.new_empty((size if is_weighted else 0, *weights.shape[1:])),
        values.new_empty((size, *values.shape[1:])),
        lengths.new_empty(num_bags),
    )


# The weights come first: opcheck adds up the outputs, and only floats may be added to.
_permute_segments = register("permute_segments", reference=reference.permute_segments, fake=_fake)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.num_bags = inputs[0].numel()
    ctx.layout = inputs[3:]


def _grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """Put the gradient of the weights back in place; what a repeated segment got is summed."""
    is_weighted, order, bags, counts = ctx.layout
    num_segments = len(bags) if len(bags) != 1 or bags[0] == 0 else ctx.num_bags // bags[0]
    if not is_weighted:
        grads = None
    elif _is_permutation(order, num_segments):
        (lengths,) = ctx.saved_tensors
        inverse = sorted(range(num_segments), key=order.__getitem__)
        moved = [part if len(part) == 1 else [part[s] for s in order] for part in (bags, counts)]
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
    none = values.new_empty(0) if weights is None else weights.contiguous()
    tensors = lengths.contiguous(), values.contiguous(), none
    arguments = (*tensors, weights is not None, order, *_pack(bags, counts))
    if weights is None and not torch.compiler.is_compiling():
        with torch._C._AutoDispatchBelowAutograd():  # the way through autograd takes 10 µs
            permuted = _permute_segments(*arguments)
    else:
        permuted = _permute_segments(*arguments)
    moved_lengths = permuted[2] if lengths.dtype == narrow else permuted[2].to(narrow)
    return moved_lengths, permuted[1], None if weights is None else permuted[0]
