"""The definition of offsets, in plain PyTorch."""

import torch
from torch import Tensor


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Sum up lengths from 0 on, in their own dtype."""
    offsets = lengths.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths.reshape(-1), 0, out=offsets[1:])
    return offsets
