"""The definition of regroup and of its gradient, in plain PyTorch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _by_group(blocks: Sequence[int], sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    triples = iter(zip(blocks[0::3], blocks[1::3], blocks[2::3], strict=True))
    for size in sizes:
        yield [next(triples) for _ in range(size)]


def regroup(values: Sequence[Tensor], blocks: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Join the blocks (tensor, first column, width) of each group; `sizes` blocks each."""
    empty = values[0][:, :0]
    return [
        torch.cat([empty, *(values[i][:, start : start + width] for i, start, width in group)], 1)
        for group in _by_group(blocks, sizes)
    ]


def regroup_grad(
    grads: Sequence[Tensor], blocks: Sequence[int], sizes: Sequence[int], widths: Sequence[int]
) -> list[Tensor]:
    """Add the columns of each group's gradient to the columns that they came from."""
    sums = [grads[0].new_zeros(grads[0].shape[0], width) for width in widths]
    for grad, group in zip(grads, _by_group(blocks, sizes), strict=True):
        column = 0
        for i, start, width in group:
            sums[i][:, start : start + width] += grad[:, column : column + width]
            column += width
    return sums
