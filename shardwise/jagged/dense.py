"""Bags to and from dense tensors: lists of bags, and rows padded to one width."""

from collections.abc import Sequence

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor


def bags_to_list(
    values: Shaped[Tensor, " V *rest"], lengths: Integer[Tensor, " B"]
) -> list[Shaped[Tensor, " length *rest"]]:
    """Cut values into one view per bag; on an accelerator this waits for the device."""
    return list(torch.split(values, lengths.tolist()))


def bags_to_rows(
    values: Shaped[Tensor, " V *rest"],
    lengths: Integer[Tensor, " B"],
    offsets: Integer[Tensor, " P"],
    width: int | None,
    padding_value: float | int,
) -> Shaped[Tensor, " B N *rest"]:
    """Lay each bag in a row of `width` values: longer ones keep their head, shorter are padded.

    Args:
        values: The values, bag after bag.
        lengths: Values per bag.
        offsets: Start of each bag.
        width: N; None takes the longest bag, which waits for the device.
        padding_value: What fills the places that no value takes.
    """
    if width is None:
        width = int(lengths.max()) if lengths.numel() > 0 else 0
    columns = torch.arange(width, device=values.device)
    is_value = columns < lengths.unsqueeze(1)  # (B, N)
    # Places without a value read the padding, which stands behind the last value.
    padded = torch.cat([values, values.new_full((1, *values.shape[1:]), padding_value)])
    positions = torch.where(is_value, offsets[:-1].unsqueeze(1) + columns, values.shape[0])
    return padded[positions]


def rows_to_bags(
    rows: Shaped[Tensor, " B N *rest"], lengths: Integer[Tensor, " B"]
) -> Shaped[Tensor, " V *rest"]:
    """Keep the first `lengths[b]` values of each row."""
    return rows[torch.arange(rows.shape[1], device=rows.device) < lengths.unsqueeze(1)]


def list_lengths(bags: Sequence[Shaped[Tensor, "..."]]) -> Integer[Tensor, " B"]:
    """Give the length of each bag as int32, on the device of the bags."""
    return torch.tensor(
        [bag.shape[0] for bag in bags],
        dtype=torch.int32,
        device=bags[0].device if bags else None,
    )
