"""The definition of `route` and `unpack`, in plain PyTorch.

A *split* reads one input through one cutting of a table's rows: (input, mode, first block, blocks,
first slot, slots). Its blocks, (end row, slot, base), follow one another from row 0; rows of a
block go to its slot, less the base. Each slot is a *channel* to one rank; channels are numbered
rank after rank.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.lookup.reference import CLIP, HASH, RAISE

PARTIALS, ROWS = 0, 1


class Bags(NamedTuple):
    """The bags of one input, over all sources."""

    numbers: Tensor  # of each bag, in the call
    lengths: Tensor
    positions: Tensor  # of each id, in the call


class Channel(NamedTuple):
    """What goes to one rank for one slot."""

    ids: Tensor
    lengths: Tensor  # of its bags; none for rows
    origins: Tensor  # positions of the ids in the call; none for rows


def bags_of(offsets: Tensor, bags: Tensor, key: int) -> Bags:
    """Find the bags of an input; the ids lie as [source][input][bag]."""
    counts = bags.t().reshape(-1).cumsum(0).view(bags.shape[1], bags.shape[0]) - bags.t()
    ranges = zip(counts[:, key].tolist(), bags[key].tolist(), strict=True)
    numbers = torch.cat(
        [torch.arange(first, first + n, device=offsets.device) for first, n in ranges]
    )
    lengths = offsets.diff()[numbers].long()
    starts = offsets[:-1].long()[numbers] - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    positions = torch.repeat_interleave(starts, lengths, output_size=total)
    return Bags(numbers, lengths, positions + torch.arange(total, device=offsets.device))


def settle(
    rows: Tensor, bags: Bags, num_rows: int, split: int, bad_ids: int
) -> tuple[Tensor, Tensor]:
    """Apply the policy for bad ids: rows of the table, and which ids count."""
    is_good = (rows >= 0) & (rows < num_rows)
    if bad_ids == HASH:
        return rows.remainder(num_rows), torch.ones_like(is_good)
    if bad_ids == CLIP:
        return rows.clamp(0, num_rows - 1), torch.ones_like(is_good)
    if bad_ids == RAISE and not bool(is_good.all()):
        place = int((~is_good).nonzero()[0])
        bag = int(torch.searchsorted(bags.lengths.cumsum(0), place, right=True))
        raise RuntimeError(
            f"shardwise: split {split}, bag {bag}: id {rows[place].item()} is outside a table of "
            f"{num_rows} rows"
        )
    return rows, is_good


def route(  # noqa: PLR0913  # the operator's arguments, in its order
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor,
    is_weighted: bool,
    bags: Tensor,
    splits: Tensor,
    blocks: Tensor,
    channels: Tensor,
    first_channel: Tensor,
    bad_ids: int,
    is_wide: bool,
) -> tuple[Tensor, ...]:
    """Give (message, sizes, counts, entries, entry offsets, origins, bad counts)."""
    device = ids.device
    filled: dict[int, Channel] = {}
    entries, entry_counts, bad_counts = [], [], []
    for number, (key, mode, first, count, first_slot, num_slots) in enumerate(splits.tolist()):
        own = bags_of(offsets, bags, key)
        ends, slots, bases = blocks[first : first + count].to(device).t().contiguous()
        raw = ids[own.positions].long()
        num_rows = int(ends[-1])
        rows, is_good = settle(raw, own, num_rows, number, bad_ids)
        bad_counts.append(((raw < 0) | (raw >= num_rows)).sum())
        block = torch.searchsorted(ends, rows.clamp(0, num_rows - 1), right=True)
        slot, relative = slots[block], rows - bases[block]
        send = _send_partials if mode == PARTIALS else _send_rows
        sent, pairs, pairs_per_bag = send(own, slot, relative, is_good, num_slots)
        entries.append(pairs)
        entry_counts.append(pairs_per_bag)
        numbers = channels[first_slot : first_slot + num_slots].tolist()
        filled |= zip(numbers, sent, strict=True)
    none = torch.empty(0, dtype=torch.int64, device=device)
    every = [filled.get(c, Channel(none, none, none)) for c in range(int(first_channel[-1]))]
    counts = [(c.lengths.numel(), c.ids.numel()) for c in every]
    limits = first_channel.tolist()
    own_weights = weights if is_weighted else None
    messages = [
        _pack(every[low:high], own_weights, is_wide, device) for low, high in pairwise(limits)
    ]
    origins = torch.cat([none, *(c.origins for c in every)]) if is_weighted else none
    return (
        torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *messages]),
        torch.tensor([m.numel() for m in messages], dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int64).view(-1, 2),
        torch.cat([none.view(0, 2), *entries]).int(),
        torch.cat([none.new_zeros(1), *entry_counts]).cumsum(0),
        origins,
        torch.stack(bad_counts).cpu() if bad_counts else torch.empty(0, dtype=torch.int64),
    )


def _send_partials(
    own: Bags, slot: Tensor, relative: Tensor, is_good: Tensor, num_slots: int
) -> tuple[list[Channel], Tensor, Tensor]:
    num_bags = own.lengths.numel()
    bag = torch.repeat_interleave(torch.arange(num_bags, device=slot.device), own.lengths)
    key = slot * num_bags + bag
    order = torch.argsort(key + (~is_good) * (num_slots * num_bags), stable=True)
    order = order[: int(is_good.sum())]
    groups, lengths = torch.unique_consecutive(key[order], return_counts=True)
    group_slot, group_bag = groups // max(num_bags, 1), groups % max(num_bags, 1)
    per_slot = torch.bincount(group_slot, minlength=num_slots)
    firsts = per_slot.cumsum(0) - per_slot
    position = torch.arange(groups.numel(), device=slot.device) - firsts[group_slot]
    by_bag = torch.argsort(group_bag * num_slots + group_slot)
    pairs = torch.stack([group_slot, position], 1)[by_bag]
    ids_per_slot = torch.bincount(slot[order], minlength=num_slots).tolist()
    sent = [
        Channel(*parts)
        for parts in zip(
            relative[order].split(ids_per_slot),
            lengths.split(per_slot.tolist()),
            own.positions[order].split(ids_per_slot),
            strict=True,
        )
    ]
    return sent, pairs, torch.bincount(group_bag, minlength=num_bags)


def _send_rows(
    own: Bags, slot: Tensor, relative: Tensor, is_good: Tensor, num_slots: int
) -> tuple[list[Channel], Tensor, Tensor]:
    device = slot.device
    stride = int(relative.max()) + 1 if relative.numel() else 1
    key = torch.where(is_good, slot * stride + relative, num_slots * stride)
    distinct, group = key.unique(return_inverse=True)
    place = torch.arange(key.numel(), device=device)
    first = torch.full_like(distinct, key.numel()).scatter_reduce_(0, group, place, "amin")
    group_slot = distinct // stride  # num_slots for bad ids
    order = torch.argsort(group_slot * (key.numel() + 1) + first)
    per_slot = torch.bincount(group_slot, minlength=num_slots + 1)
    firsts = per_slot.cumsum(0) - per_slot
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=device) - firsts[group_slot[order]]
    pairs = torch.stack([slot, position[group]], 1)
    pairs[~is_good] = torch.tensor([-1, 0], device=device)
    ids = (distinct % stride)[order].split(per_slot.tolist())[:num_slots]
    none = torch.empty(0, dtype=torch.int64, device=device)
    return [Channel(each, none, none) for each in ids], pairs, own.lengths


def _pack(
    sent: list[Channel], weights: Tensor | None, is_wide: bool, device: torch.device
) -> Tensor:
    """Lay out the message to one rank: ids, lengths, weights; padded to 8 bytes."""
    dtype = torch.int64 if is_wide else torch.int32
    parts = [channel.ids.to(dtype) for channel in sent]
    parts += [
        c.lengths.int() for c in sent if c.lengths.numel() != c.ids.numel() and c.lengths.numel()
    ]
    if weights is not None:
        parts += [weights[c.origins].float() for c in sent if c.lengths.numel()]
    pieces = [part.contiguous().view(torch.uint8) for part in parts]
    message = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *pieces])
    return torch.nn.functional.pad(message, (0, -message.numel() % 8))


def unpack(
    message: Tensor, counts: Tensor, modes: Tensor, is_weighted: bool, is_wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give (ids, offsets, weights) of all sources' messages, as [source][channel][bag]."""
    device = message.device
    dtype = torch.int64 if is_wide else torch.int32
    ids, lengths, weights = [], [torch.zeros(1, dtype=torch.int64, device=device)], []
    start = 0
    is_rows = modes.tolist()

    def take(count: int, kind: torch.dtype) -> Tensor:
        nonlocal start
        size = count * kind.itemsize
        piece = message[start : start + size].view(kind)
        start += size
        return piece

    for source in counts.tolist():
        ids += [take(n, dtype) for _, n in source]
        for mode, (bags, n) in zip(is_rows, source, strict=True):
            if mode == ROWS:
                lengths.append(torch.tensor([n], device=device))
            elif bags == n:
                lengths.append(torch.ones(n, dtype=torch.int64, device=device))
            else:
                lengths.append(take(bags, torch.int32).long())
        for mode, (_, n) in zip(is_rows, source, strict=True):
            if is_weighted:
                ones = torch.ones(n, device=device)
                weights.append(ones if mode == ROWS else take(n, torch.float32))
        start += -start % 8
    none = torch.empty(0, dtype=dtype, device=device)
    return (
        torch.cat([none, *ids]),
        torch.cat(lengths).cumsum(0),
        torch.cat([torch.empty(0, device=device), *weights]),
    )
