"""The definition of `route` and `unpack`, in plain PyTorch.

A *split* reads one input through one cutting of a table's rows: (input, mode, first block, blocks,
first slot, slots). Its blocks, (end row, slot, base), follow one another from row 0; rows of a
block go to its slot, less the base. Each slot is a *channel* to one rank; channels are numbered
rank after rank.
"""

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


class Sent(NamedTuple):
    """What a split sends, slot after slot, and what its bags are made of."""

    ids: Tensor
    id_slots: Tensor
    origins: Tensor  # positions of the ids in the call; -1 for rows
    lengths: Tensor  # of the bags; none for rows
    bag_slots: Tensor
    entries: Tensor
    entries_per_bag: Tensor
    num_bad: Tensor  # [1]


class Found(NamedTuple):
    """Where the ids of a split go."""

    slot: Tensor
    relative: Tensor  # the ids less the bases of their blocks
    is_good: Tensor  # whether they are sent
    num_slots: int
    num_bad: Tensor  # [1]


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
    if bad_ids == HASH and num_rows:
        return rows.remainder(num_rows), torch.ones_like(is_good)
    if bad_ids == CLIP and num_rows:
        return rows.clamp(0, num_rows - 1), torch.ones_like(is_good)
    if bad_ids == RAISE and not bool(is_good.all()):
        place = int((~is_good).nonzero()[0])
        bag = int(torch.searchsorted(bags.lengths.cumsum(0), place, right=True))
        raise RuntimeError(
            f"shardwise: split {split}, bag {bag}: id {rows[place].item()} is outside a table of "
            f"{num_rows} rows"
        )
    return rows, is_good


def find_slots(
    ids: Tensor, own: Bags, blocks: Tensor, place: list[int], split: int, bad_ids: int
) -> Found:
    """Find the slot of each id of a split, whose (first block, blocks, …, slots) are `place`."""
    first, count, _, num_slots = place
    ends, slots, bases = blocks[first : first + count].to(ids.device).t().contiguous()
    raw, num_rows = ids[own.positions].long(), int(ends[-1])
    rows, is_good = settle(raw, own, num_rows, split, bad_ids)
    block = torch.searchsorted(ends, rows.clamp(0, max(num_rows - 1, 0)), right=True)
    block = block.clamp(max=count - 1)  # of a table without rows
    num_bad = ((raw < 0) | (raw >= num_rows)).sum().view(1)
    return Found(slots[block], rows - bases[block], is_good, num_slots, num_bad)


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
    none = torch.empty(0, dtype=torch.int64, device=ids.device)
    every = [Sent(none, none, none, none, none, none.view(0, 2), none, none)]
    for number, (key, mode, *place) in enumerate(splits.tolist()):
        own = bags_of(offsets, bags, key)
        found = find_slots(ids, own, blocks, place, number, bad_ids)
        sent = _send_partials(own, found) if mode == PARTIALS else _send_rows(own, found)
        channel_of = channels.to(ids.device)[place[2] :]
        every.append(
            sent._replace(id_slots=channel_of[sent.id_slots], bag_slots=channel_of[sent.bag_slots])
        )
    sent = _by_channel(Sent(*(torch.cat(parts) for parts in zip(*every, strict=True))))
    own_weights = weights if is_weighted else None
    message, sizes, counts = _pack(sent, own_weights, is_wide, first_channel.to(ids.device))
    return (
        message,
        sizes.cpu(),
        counts.cpu(),
        sent.entries.int(),
        torch.cat([none.new_zeros(1), sent.entries_per_bag]).cumsum(0),
        sent.origins[sent.origins >= 0] if is_weighted else none,
        sent.num_bad.cpu(),
    )


def _send_partials(own: Bags, found: Found) -> Sent:
    slot, relative, is_good, num_slots, num_bad = found
    num_bags = own.lengths.numel()
    bag = torch.repeat_interleave(torch.arange(num_bags, device=slot.device), own.lengths)
    key = slot * num_bags + bag
    order = torch.argsort(key + (~is_good) * (num_slots * num_bags), stable=True)
    order = order[: int(is_good.sum())]
    groups, lengths = torch.unique_consecutive(key[order], return_counts=True)
    group_slot, group_bag = groups // max(num_bags, 1), groups % max(num_bags, 1)
    pairs = torch.stack([group_slot, _number_within(group_slot, num_slots)], 1)
    by_bag = torch.argsort(group_bag * num_slots + group_slot)
    return Sent(
        relative[order],
        slot[order],
        own.positions[order],
        lengths,
        group_slot,
        pairs[by_bag],
        torch.bincount(group_bag, minlength=num_bags),
        num_bad,
    )


def _send_rows(own: Bags, found: Found) -> Sent:
    slot, relative, is_good, num_slots, num_bad = found
    relative = relative.where(is_good, 0)
    stride = int(relative.max()) + 1 if relative.numel() else 1
    key = torch.where(is_good, slot * stride + relative, num_slots * stride)
    distinct, group = key.unique(return_inverse=True)
    place = torch.arange(key.numel(), device=slot.device)
    first = torch.full_like(distinct, key.numel()).scatter_reduce_(0, group, place, "amin")
    group_slot = distinct // stride  # num_slots for bad ids
    order = torch.argsort(group_slot * (key.numel() + 1) + first)
    position = torch.empty_like(order)
    position[order] = _number_within(group_slot[order], num_slots + 1)
    pairs = torch.stack([slot, position[group]], 1)
    pairs[~is_good] = torch.tensor([-1, 0], device=slot.device)
    order = order[group_slot[order] < num_slots]
    none = slot[:0]
    ids, origins = (distinct % stride)[order], torch.full_like(order, -1)
    return Sent(ids, group_slot[order], origins, none, none, pairs, own.lengths, num_bad)


def _number_within(group: Tensor, count: int) -> Tensor:
    """Number the members of each group, which lie one group after another, from 0."""
    sizes = torch.bincount(group, minlength=count)
    return torch.arange(group.numel(), device=group.device) - (sizes.cumsum(0) - sizes)[group]


def _by_channel(sent: Sent) -> Sent:
    """Order ids and bags by channel; those of one channel stay in order."""
    ids, bags = sent.id_slots.argsort(stable=True), sent.bag_slots.argsort(stable=True)
    return sent._replace(
        ids=sent.ids[ids],
        id_slots=sent.id_slots[ids],
        origins=sent.origins[ids],
        lengths=sent.lengths[bags],
        bag_slots=sent.bag_slots[bags],
    )


def _pack(
    sent: Sent, weights: Tensor | None, is_wide: bool, first_channel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give (message, sizes, counts) of what is sent, whose slots are channels."""
    num_channels, num_ranks = int(first_channel[-1]), first_channel.numel() - 1
    ranks = torch.arange(num_ranks, device=first_channel.device)
    rank_of = torch.repeat_interleave(ranks, first_channel.diff())
    num_bags = torch.bincount(sent.bag_slots, minlength=num_channels)
    counts = torch.stack([num_bags, torch.bincount(sent.id_slots, minlength=num_channels)], 1)
    is_sent = (counts[:, 0] != counts[:, 1])[sent.bag_slots]
    dtype = torch.int64 if is_wide else torch.int32
    words = [sent.ids.to(dtype).view(torch.int32), sent.lengths[is_sent].int()]
    owners = [
        rank_of[sent.id_slots].repeat_interleave(dtype.itemsize // 4),
        rank_of[sent.bag_slots[is_sent]],
    ]
    if weights is not None:
        is_partial = sent.origins >= 0
        words.append(weights[sent.origins[is_partial]].float().view(torch.int32))
        owners.append(rank_of[sent.id_slots[is_partial]])
    owner, order = torch.cat(owners).sort(stable=True)
    sizes = (torch.bincount(owner, minlength=num_ranks) + 1) // 2 * 2
    starts = sizes.cumsum(0) - sizes
    message = torch.zeros(int(sizes.sum()), dtype=torch.int32, device=owner.device)
    message[starts[owner] + _number_within(owner, num_ranks)] = torch.cat(words)[order]
    return message.view(torch.uint8), sizes * 4, counts


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
