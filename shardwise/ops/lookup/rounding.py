"""Stochastic rounding with random bits keyed by (seed, step, table, row, column).

A key, not a stream: the bits of an element are the same whatever the thread, rank, slice or device
that updates it. The hash is the 32-bit finalizer of MurmurHash3 (A. Appleby, 2011).
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1


def _mix(bits: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)


def random_bits(seed: int, step: int, table: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Give 32 random bits [N, D] for each element of the rows [N] and columns [D], as int64."""
    key = torch.zeros((), dtype=torch.int64, device=rows.device)
    for word in (seed & _MASK, seed >> 32, step & _MASK, table & _MASK):
        key = _mix((key + word) & _MASK)
    row_keys = _mix((_mix((key + rows) & _MASK) + (rows >> 32)) & _MASK)
    return _mix(row_keys[:, None] ^ ((columns * _GOLDEN) & _MASK))


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to float16 or bfloat16, up with the probability of the part cut off.

    Values past the largest float16 stay there; infinities and NaN are kept.
    """
    raw = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    sign, size = raw & 0x80000000, raw & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (size + (bits & 0xFFFF)) & 0xFFFF0000
        result = _from_bits(sign | rounded)
    else:
        result = _from_bits(sign | _round_to_half(size, bits))
    return torch.where(torch.isfinite(values), result, values).to(dtype)


def _round_to_half(size: Tensor, bits: Tensor) -> Tensor:
    """Round the bits of positive float32 to those of a float32 that float16 holds exactly."""
    normal = (size + (bits & 0x1FFF)) & 0xFFFFE000
    exponent = size >> 23
    shift = (126 - exponent).clamp(0, 31)
    mantissa = (size & 0x7FFFFF) | 0x800000
    units = (mantissa + (bits & ((1 << shift) - 1))) >> shift  # in 2^-24, float16's smallest
    tiny = (units.float() * 2.0**-24).view(torch.int32).to(torch.int64)
    return torch.where(exponent >= 113, normal.clamp(max=0x477FE000), tiny)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
