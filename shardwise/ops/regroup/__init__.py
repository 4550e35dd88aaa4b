"""Regroup: join column blocks of several tensors into new tensors, in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from shardwise.ops.library import register
from shardwise.ops.regroup import reference

__all__ = ["Block", "regroup"]

Block = tuple[int, int, int]
"""A run of columns: (number of the tensor, first column, width)."""


def _group_widths(blocks: Sequence[int], sizes: Sequence[int]) -> list[int]:
    widths, start = [], 0
    for size in sizes:
        widths.append(sum(blocks[3 * start + 2 : 3 * (start + size) : 3]))
        start += size
    return widths


def _fake(values: Sequence[Tensor], blocks: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    rows = values[0].shape[0]
    return [values[0].new_empty(rows, width) for width in _group_widths(blocks, sizes)]


def _fake_grad(
    grads: Sequence[Tensor], blocks: Sequence[int], sizes: Sequence[int], widths: Sequence[int]
) -> list[Tensor]:
    return [grads[0].new_empty(grads[0].shape[0], width) for width in widths]


_regroup = register("regroup", reference=reference.regroup, fake=_fake)
_regroup_grad = register("regroup_grad", reference=reference.regroup_grad, fake=_fake_grad)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.blocks, ctx.sizes, *_ = inputs
    ctx.widths = [tensor.shape[1] for tensor in tensors]


def _grads(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    grads = [grad.contiguous() for grad in grads]
    return _regroup_grad(grads, ctx.blocks, ctx.sizes, ctx.widths), None, None


def _grads_of_grads(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return _regroup([grad.contiguous() for grad in grads], ctx.blocks, ctx.sizes), None, None, None


torch.library.register_autograd("shardwise::regroup", _grads, setup_context=_keep_layout)
torch.library.register_autograd(
    "shardwise::regroup_grad", _grads_of_grads, setup_context=_keep_layout
)


def regroup(
    values: Sequence[Shaped[Tensor, "B _"]], groups: Sequence[Sequence[Block]]
) -> list[Shaped[Tensor, "B _"]]:
    """Join the column blocks of each group.

    Args:
        values: Tensors of as many rows, on one device. Mixed dtypes are promoted.
        groups: Blocks of each result, in order; a block may be used several times or never.

    Returns:
        One contiguous tensor per group, of its own memory. In backward the gradients of a block
        that was used several times are summed.
    """
    dtype = values[0].dtype
    for tensor in values[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    blocks = [number for group in groups for block in group for number in block]
    tensors = [tensor.to(dtype).contiguous() for tensor in values]
    joined: list[Tensor] = _regroup(tensors, blocks, [len(group) for group in groups])
    return joined
