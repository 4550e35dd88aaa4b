"""Route ids to the ranks that hold their rows, and lay out what arrives for the lookup.

See `reference` for the definition, and `docs/sharding.md` for what the words mean.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from shardwise.ops.library import register
from shardwise.ops.route import reference

__all__ = ["PARTIALS", "ROWS", "Routed", "Routes", "route", "unpack"]

PARTIALS, ROWS = reference.PARTIALS, reference.ROWS


class Routes(NamedTuple):
    """Where ids go: tables of integers on the CPU; see `reference`."""

    splits: Tensor
    """Per split [P, 6]: input, mode, first block, blocks, first slot, slots."""
    blocks: Tensor
    """Per block [M, 3]: end row, slot, base."""
    channels: Tensor
    """Of each slot of each split."""
    first_channel: Tensor
    """Of each rank, and the number of all [W + 1]."""


class Routed(NamedTuple):
    """What `route` gives."""

    message: Tensor
    """Bytes to all ranks, one rank's after another's."""
    sizes: Tensor
    """Bytes to each rank [W]."""
    counts: Tensor
    """Per channel, its bags (none for rows) and ids [C, 2]."""
    entries: Tensor
    """Which vectors make up the bags, split after split: (slot, position in its channel) [E, 2]."""
    entry_offsets: Tensor
    """Where the entries of each bag of each split start, and where the last one's end."""
    origins: Tensor
    """Of weighted partials, which of the call's ids each sent id is."""
    bad_counts: Tensor
    """Per split, the ids that were outside the table [P]."""


def _fake_route(ids: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    splits, ranks = arguments[4], arguments[7].shape[0] - 1
    size = torch.library.get_ctx().new_dynamic_size
    whole = splits.new_empty
    return (
        ids.new_empty(size(), dtype=torch.uint8),
        whole(ranks),
        whole(size(), 2),
        ids.new_empty(size(), 2, dtype=torch.int32),
        ids.new_empty(size(), dtype=torch.int64),
        ids.new_empty(size(), dtype=torch.int64),
        whole(splits.shape[0]),
    )


def _fake_unpack(message: Tensor, counts: Tensor, modes: Tensor, *flags: bool) -> tuple[Any, ...]:
    size = torch.library.get_ctx().new_dynamic_size
    ids = message.new_empty(size(), dtype=torch.int64 if flags[1] else torch.int32)
    return (
        ids,
        message.new_empty(size(), dtype=torch.int64),
        message.new_empty(size(), dtype=torch.float32),
    )


_route = register("route", reference=reference.route, fake=_fake_route)
_unpack = register("unpack", reference=reference.unpack, fake=_fake_unpack)


def route(
    ids: Int[Tensor, " V"],
    offsets: Int[Tensor, " P"],
    weights: Float[Tensor, " _"],
    is_weighted: bool,
    bags: Int[Tensor, "K S"],
    routes: Routes,
    bad_ids: int,
    is_wide: bool,
) -> Routed:
    """Turn ids into one message to each rank, and remember how the answer is put together.

    The message to a rank holds the ids of its channels, int32 or int64; then the lengths, int32, of
    each channel of partials that has other lengths than 1; then with weights those of the partials;
    padded to 8 bytes.

    Args:
        ids: As [source][input][bag].
        offsets: Where each bag starts, and where the last one ends.
        weights: Per id; read if weighted.
        is_weighted: Whether weights travel with partials.
        bags: Per input and source, how many.
        routes: Fixed by the plan.
        bad_ids: A `BadIds`; ids left out by it are not sent.
        is_wide: Whether ids travel as int64.

    Raises:
        RuntimeError: An id is outside its table and `bad_ids` says so.
    """
    arguments = (ids, offsets, weights, is_weighted, bags, *routes, int(bad_ids), is_wide)
    return Routed(*_route(*arguments))


def unpack(
    message: UInt8[Tensor, " _"],
    counts: Int[Tensor, "S C 2"],
    modes: Int[Tensor, " C"],
    is_weighted: bool,
    is_wide: bool,
) -> tuple[Int[Tensor, " V"], Int[Tensor, " P"], Float[Tensor, " _"]]:
    """Lay out what arrived from all ranks as [source][channel][bag].

    A channel of rows has one bag per source. Weights of its ids, which stay at home, are 1.

    Args:
        message: The messages, one source's after another's.
        counts: Bags and ids of each channel.
        modes: PARTIALS or ROWS, of each channel.
        is_weighted: Whether partials have weights.
        is_wide: Whether ids are int64.

    Returns:
        Ids, int32 or int64; offsets of the bags; weights, empty if there are none.
    """
    ids, offsets, weights = _unpack(message, counts, modes, is_weighted, is_wide)
    return ids, offsets, weights
