"""Routing gives what a loop over all bags would, and unpacking undoes it."""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from shardwise.ops import library
from shardwise.ops.lookup import BadIds
from shardwise.ops.route import PARTIALS, ROWS, Routed, Routes, reference, route, unpack

NO_WEIGHTS = torch.empty(0)


@dataclass(frozen=True)
class Split:
    """One input read through one cutting of the rows."""

    key: int
    mode: int
    blocks: tuple[tuple[int, int, int], ...]  # end row, slot, base
    ranks: tuple[int, ...]  # of each slot


@dataclass(frozen=True)
class Case:
    """A call of `route`."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor
    is_weighted: bool
    bags: Tensor
    splits: tuple[Split, ...]
    routes: Routes
    bad_ids: BadIds = BadIds.RAISE
    is_wide: bool = False


def run(case: Case) -> Routed:
    return route(
        case.ids,
        case.offsets,
        case.weights,
        case.is_weighted,
        case.bags,
        case.routes,
        case.bad_ids,
        case.is_wide,
    )


def make_routes(splits: tuple[Split, ...], ranks: int, unused: tuple[int, ...] = ()) -> Routes:
    """Number the channels of all slots rank after rank; each rank in `unused` has one more."""
    slots = [(r, p, s) for p, split in enumerate(splits) for s, r in enumerate(split.ranks)]
    ordered = sorted(slots + [(r, -1, n) for n, r in enumerate(unused)])
    number = {place: c for c, place in enumerate(ordered)}
    rows, blocks, slot = [], [], 0
    for split in splits:
        rows.append((split.key, split.mode, len(blocks), len(split.blocks), slot, len(split.ranks)))
        blocks += split.blocks
        slot += len(split.ranks)
    firsts = [sum(r < q for r, _, _ in ordered) for q in range(ranks + 1)]
    channels = torch.tensor([number[place] for place in slots], dtype=torch.int64)
    return Routes(
        torch.tensor(rows, dtype=torch.int64).view(-1, 6),
        torch.tensor(blocks, dtype=torch.int64).view(-1, 3),
        channels,
        torch.tensor(firsts),
    )


def even_split(key: int, mode: int, num_rows: int, ranks: int) -> Split:
    """Cut rows into equal blocks, one per rank."""
    height = -(-num_rows // ranks)
    blocks = ((min(num_rows, (r + 1) * height), r, r * height) for r in range(ranks))
    return Split(key, mode, tuple(blocks), tuple(range(ranks)))


def random_split(draw: random.Random, key: int, num_rows: int, ranks: int) -> Split:
    """Cut rows into equal or uneven blocks, of which several may share a slot."""
    count = draw.randint(1, 5)
    mode = draw.choice([PARTIALS, ROWS])
    owners = tuple(draw.randrange(ranks) for _ in range(count))
    if draw.random() < 0.3 and num_rows >= count:
        return replace(even_split(key, mode, num_rows, count), ranks=owners)
    ends = [*sorted(draw.randint(0, num_rows) for _ in range(draw.randint(0, 6))), num_rows]
    starts = [0, *ends[:-1]]
    slots = [draw.randrange(count) for _ in ends]
    is_alone = len(set(slots)) == len(slots)
    bases = starts if is_alone else [0] * len(ends)  # slots that share a channel keep row numbers
    return Split(key, mode, tuple(zip(ends, slots, bases, strict=True)), owners)


def make_ids(
    generator: torch.Generator, bags: Tensor, rows: list[int], longest: int
) -> tuple[Tensor, Tensor]:
    """Draw ids below `rows[k]` for input k, up to `longest` a bag: (ids, offsets)."""
    lengths, ids = [torch.zeros(1, dtype=torch.int64)], []
    for counts in bags.t().tolist():
        for key, count in enumerate(counts):
            lengths.append(torch.randint(0, longest + 1, (count,), generator=generator))
            many = int(lengths[-1].sum())
            ids.append(torch.randint(0, rows[key], (many,), generator=generator))
    return torch.cat([lengths[0][:0], *ids]), torch.cat(lengths).cumsum(0)


def random_case(seed: int) -> Case:
    """Draw everything: inputs, sources, cuttings, modes, policies, dtypes."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    inputs, sources, ranks = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4)
    rows = [draw.choice([1, 2, 7, 100, 3_000_000_000]) for _ in range(inputs)]
    keys = [draw.randrange(inputs) for _ in range(draw.randint(0, 4))]
    splits = tuple(random_split(draw, key, rows[key], ranks) for key in keys)
    bags = torch.randint(0, draw.choice([1, 5, 30]), (inputs, sources), generator=generator)
    bad_ids = draw.choice(list(BadIds))
    most = [r if bad_ids == BadIds.RAISE else 2 * r for r in rows]
    ids, offsets = make_ids(generator, bags, most, draw.choice([0, 1, 4, 40]))
    if bad_ids != BadIds.RAISE:
        ids -= torch.randint(0, 2, ids.shape, generator=generator) * 3
    is_weighted = draw.random() < 0.5
    is_wide = max(rows) > 2**31
    return Case(
        ids if is_wide or draw.random() < 0.5 else ids.int(),
        offsets.int() if draw.random() < 0.3 else offsets,
        torch.rand(ids.shape, generator=generator) if is_weighted else NO_WEIGHTS,
        is_weighted,
        bags,
        splits,
        make_routes(splits, ranks, unused=tuple(draw.randrange(ranks) for _ in range(2))),
        bad_ids,
        is_wide or draw.random() < 0.3,
    )


def bags_by_hand(case: Case, key: int) -> list[range]:
    """Give the positions of the ids of each bag of an input, source after source."""
    found, bag = [], 0
    for source in range(case.bags.shape[1]):
        for k in range(case.bags.shape[0]):
            for _ in range(int(case.bags[k, source])):
                if k == key:
                    found.append(range(int(case.offsets[bag]), int(case.offsets[bag + 1])))
                bag += 1
    return found


def settle_by_hand(case: Case, row: int, num_rows: int) -> int | None:
    if 0 <= row < num_rows:
        return row
    if case.bad_ids == BadIds.HASH:
        return row % num_rows
    return max(0, min(row, num_rows - 1)) if case.bad_ids == BadIds.CLIP else None


class Channel:
    """What one rank is sent for one slot."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.ids: list[int] = []
        self.origins: list[int] = []
        self.lengths: list[int] = []


def route_by_hand(case: Case) -> tuple[list[Channel], list[list[tuple[int, int]]], list[int]]:
    """Give the channels, the entries of each bag of each split, and the bad ids of each split."""
    channels = [Channel(PARTIALS) for _ in range(int(case.routes.first_channel[-1]))]
    entries, bad, slot = [], [], 0
    for split in case.splits:
        numbers = case.routes.channels[slot : slot + len(split.ranks)].tolist()
        own = [channels[c] for c in numbers]
        slot += len(split.ranks)
        num_rows = split.blocks[-1][0]
        bad.append(0)
        for channel in own:
            channel.mode = split.mode
        for bag in bags_by_hand(case, split.key):
            found: list[tuple[int, int]] = []
            started = [len(channel.ids) for channel in own]
            for position in bag:
                raw = int(case.ids[position])
                bad[-1] += not 0 <= raw < num_rows
                row = settle_by_hand(case, raw, num_rows)
                if row is None:
                    found += [(-1, 0)] if split.mode == ROWS else []
                    continue
                _, target, base = next(block for block in split.blocks if row < block[0])
                if split.mode == PARTIALS or row - base not in own[target].ids:
                    own[target].ids.append(row - base)
                    own[target].origins.append(position)
                if split.mode == ROWS:
                    found.append((target, own[target].ids.index(row - base)))
            for target, channel in enumerate(own):
                if split.mode == PARTIALS and len(channel.ids) > started[target]:
                    channel.lengths.append(len(channel.ids) - started[target])
                    found.append((target, len(channel.lengths) - 1))
            entries.append(found)
    return channels, entries, bad


def message_by_hand(case: Case, channels: list[Channel]) -> bytes:
    dtype = torch.int64 if case.is_wide else torch.int32
    ids = [torch.tensor(c.ids, dtype=dtype) for c in channels]
    partials = [c for c in channels if c.mode == PARTIALS]
    lengths = [
        torch.tensor(c.lengths, dtype=torch.int32) for c in partials if len(c.lengths) != len(c.ids)
    ]
    weights = [case.weights[c.origins].float() for c in partials] if case.is_weighted else []
    text = b"".join(part.numpy().tobytes() for part in (*ids, *lengths, *weights))
    return text + bytes(-len(text) % 8)


def check_by_hand(case: Case) -> None:
    routed = run(case)
    channels, entries, bad = route_by_hand(case)
    firsts = case.routes.first_channel.tolist()
    messages = [
        message_by_hand(case, channels[low:high]) for low, high in itertools.pairwise(firsts)
    ]
    assert routed.message.numpy().tobytes() == b"".join(messages)
    assert routed.sizes.tolist() == [len(message) for message in messages]
    assert routed.counts.tolist() == [[len(c.lengths), len(c.ids)] for c in channels]
    assert routed.bad_counts.tolist() == bad
    limits = routed.entry_offsets.tolist()
    pairs = [tuple(pair) for pair in routed.entries.tolist()]
    assert [pairs[a:b] for a, b in itertools.pairwise(limits)] == entries
    sent = [p for c in channels if c.mode == PARTIALS for p in c.origins]
    assert routed.origins.tolist() == (sent if case.is_weighted else [])


def same(actual: Routed, wanted: tuple[Tensor, ...]) -> bool:
    pairs = zip(actual, wanted, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def by_reference(case: Case) -> tuple[Tensor, ...]:
    call = (case.ids, case.offsets, case.weights, case.is_weighted, case.bags)
    return reference.route(*call, *case.routes, case.bad_ids, case.is_wide)


def plain_case(
    splits: tuple[Split, ...], ids: list[int], lengths: list[int], **changes: object
) -> Case:
    """Make a case of one input and one source, for two ranks."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    bags = torch.tensor([[len(lengths)]])
    routes = make_routes(splits, 2)
    case = Case(torch.tensor(ids), offsets, NO_WEIGHTS, False, bags, splits, routes)
    return replace(case, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_route_does_what_a_loop_over_all_bags_does(seed):
    check_by_hand(random_case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 1000))
def test_route_does_what_a_loop_does_in_many_cases(seed):
    check_by_hand(random_case(seed))


def large_case(longest: int, mode: int, ranks: int, is_weighted: bool = False) -> Case:
    """Draw enough ids for many tasks, with ids that repeat."""
    generator = torch.Generator().manual_seed(longest)
    splits = (
        even_split(0, mode, 5000, ranks),
        even_split(1, mode, 64, 1),
        Split(1, mode, ((3, 1, 0), (40, 0, 3), (64, 1, 37)), (1, 0)),
    )
    if longest == 0:  # one id in every bag
        bags = torch.tensor([[8000, 500], [3000, 1]])
        lengths = torch.ones(int(bags.sum()), dtype=torch.int64)
        offsets = torch.cat([lengths[:1] * 0, lengths]).cumsum(0)
        ids = torch.randint(0, 64, (len(lengths),), generator=generator)
    else:
        bags = torch.tensor([[2000, 500], [700, 0]])
        ids, offsets = make_ids(generator, bags, [5000, 64], longest)
    weights = torch.rand(ids.shape, generator=generator) if is_weighted else NO_WEIGHTS
    return Case(ids, offsets, weights, is_weighted, bags, splits, make_routes(splits, ranks))


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("mode", [PARTIALS, ROWS])
@pytest.mark.parametrize("longest", [0, 1, 30])
@pytest.mark.parametrize("ranks", [2, 5])
def test_large_calls_equal_the_reference_on_any_number_of_threads(
    longest, mode, ranks, is_weighted
):
    case = large_case(longest, mode, ranks, is_weighted)
    wanted = by_reference(case)
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            assert same(run(case), wanted)
    finally:
        torch.set_num_threads(threads)


def test_one_bag_longer_than_any_task_equals_the_reference():
    split = even_split(0, PARTIALS, 1000, 2)
    case = plain_case((split,), torch.arange(20_000).remainder(1000).tolist(), [3, 19_990, 0, 7])
    assert same(run(case), by_reference(case))


def test_more_slots_than_ids_equal_the_reference():
    splits = (even_split(0, PARTIALS, 1000, 300), even_split(0, ROWS, 1000, 300))
    case = plain_case(splits, [999, 0, 5, 999, 500], [2, 0, 3], routes=make_routes(splits, 300))
    assert same(run(case), by_reference(case))


def test_bags_of_one_id_send_no_lengths():
    case = plain_case((even_split(0, PARTIALS, 10, 2),), [1, 2, 8], [1, 1, 1])
    assert run(case).sizes.tolist() == [8, 8]


def test_repeated_rows_are_sent_once():
    case = plain_case((even_split(0, ROWS, 10, 2),), [7, 1, 7, 7, 1, 2], [2, 4])
    routed = run(case)
    assert routed.counts.tolist() == [[0, 2], [0, 1]]
    assert routed.entries.tolist() == [[1, 0], [0, 0], [1, 0], [1, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_a_bad_id_is_refused_by_its_place(bad, id_dtype):
    splits = (even_split(0, PARTIALS, 20 + bad, 2), even_split(0, PARTIALS, 10, 2))
    splits = splits if bad >= 0 else splits[1:] * 2
    case = plain_case(splits, [1, 2, 3, bad, 5], [0, 2, 3], is_wide=True)
    number = 1 if bad >= 0 else 0
    text = f"split {number}, bag 2: id {bad} is outside a table of 10 rows"
    with pytest.raises(RuntimeError, match=text):
        run(replace(case, ids=case.ids.to(id_dtype)))


@pytest.mark.parametrize("mode", [PARTIALS, ROWS])
@pytest.mark.parametrize("policy", [BadIds.CLIP, BadIds.HASH, BadIds.IGNORE])
def test_a_policy_settles_bad_ids_and_counts_them(policy, mode):
    case = plain_case((even_split(0, mode, 9, 2),), [-1, 3, 9, 2**40, 8], [1, 3, 1], bad_ids=policy)
    check_by_hand(case)
    assert run(case).bad_counts.tolist() == [3]


@pytest.mark.parametrize("mode", [PARTIALS, ROWS])
@pytest.mark.parametrize("policy", [BadIds.CLIP, BadIds.HASH, BadIds.IGNORE])
def test_a_table_without_rows_is_sent_nothing(policy, mode):
    case = plain_case((Split(0, mode, ((0, 0, 0),), (1,)),), [-1, 5], [2, 0], bad_ids=policy)
    routed = run(case)
    assert routed.message.numel() == 0
    assert routed.entries.tolist() == ([[-1, 0]] * 2 if mode == ROWS else [])


def test_ids_past_32_bits_travel_whole():
    split = Split(0, PARTIALS, ((2**33, 0, 0), (2**34, 1, 5)), (0, 1))
    case = plain_case((split,), [2**33 - 1, 2**34 - 1], [1, 1], is_wide=True)
    assert run(case).message.view(torch.int64).tolist() == [2**33 - 1, 2**34 - 6]


@pytest.mark.skipif(not library.is_compiled, reason="the reference trusts its input")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"offsets": torch.tensor([0, 2, 1, 3])}, "never decrease"),
        ({"offsets": torch.tensor([0, 1, 2, 4])}, "there are 3 ids"),
        ({"bags": torch.tensor([[4]])}, "bags"),
        ({"is_weighted": True}, "0 weights for 3 ids"),
        ({"ids": torch.zeros(3)}, "ids must be"),
    ],
)
def test_input_that_contradicts_itself_is_refused(changes, text):
    case = plain_case((even_split(0, PARTIALS, 10, 2),), [1, 2, 8], [1, 1, 1])
    arguments = (case.ids, case.offsets, case.weights, case.is_weighted, case.bags)
    names = ("ids", "offsets", "weights", "is_weighted", "bags")
    given = [changes.get(n, a) for n, a in zip(names, arguments, strict=True)]
    with pytest.raises(RuntimeError, match=text):
        torch.ops.shardwise.route(*given, *case.routes, 0, False)


@pytest.mark.skipif(not library.is_compiled, reason="the reference trusts its input")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"splits": torch.tensor([[1, 0, 0, 2, 0, 2]])}, "input 1"),
        ({"splits": torch.tensor([[0, 0, 0, 3, 0, 2]])}, "blocks"),
        ({"splits": torch.tensor([[0, 0, 0, 2, 0, 3]])}, "slots"),
        ({"splits": torch.tensor([[0, 2, 0, 2, 0, 2]])}, "mode"),
        ({"blocks": torch.tensor([[5, 0, 0], [10, 2, 5]])}, "slot 2"),
        ({"blocks": torch.tensor([[5, 0, 0], [4, 1, 5]])}, "rows"),
        ({"channels": torch.tensor([0, 2])}, "channel 2"),
        ({"channels": torch.tensor([1, 1])}, "channel 1"),
        ({"first_channel": torch.tensor([0, 3, 2])}, "first_channel"),
        ({"blocks": torch.tensor([[5, 0, 0], [2**40, 1, 5]])}, "32 bits"),
    ],
)
def test_a_table_of_routes_that_contradicts_itself_is_refused(changes, text):
    case = plain_case((even_split(0, PARTIALS, 10, 2),), [1, 2, 8], [1, 1, 1])
    with pytest.raises(RuntimeError, match=text):
        run(replace(case, routes=case.routes._replace(**changes)))


def arrived(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give (message, counts, modes) at a rank to which three sources sent what the case sends."""
    routed = run(case)
    low, high = case.routes.first_channel[rank : rank + 2].tolist()
    start = int(routed.sizes[:rank].sum())
    message = routed.message[start : start + int(routed.sizes[rank])]
    channels, _, _ = route_by_hand(case)
    modes = torch.tensor([c.mode for c in channels[low:high]], dtype=torch.int64)
    return message.repeat(3), routed.counts[low:high].repeat(3, 1, 1), modes


def unpacked_by_hand(case: Case, rank: int) -> tuple[list[int], list[int], list[float]]:
    channels, _, _ = route_by_hand(case)
    own = channels[slice(*case.routes.first_channel[rank : rank + 2].tolist())]
    ids = [i for c in own for i in c.ids] * 3
    lengths = [n for c in own for n in (c.lengths if c.mode == PARTIALS else [len(c.ids)])] * 3
    weights = [
        float(case.weights[p]) if c.mode == PARTIALS else 1.0
        for c in own
        for p in c.origins
        if case.is_weighted
    ]
    return ids, lengths, weights * 3


@pytest.mark.parametrize("seed", range(40))
def test_unpack_gives_back_what_each_source_sent(seed):
    case = random_case(seed)
    for rank in range(len(case.routes.first_channel) - 1):
        ids, offsets, weights = unpack(*arrived(case, rank), case.is_weighted, case.is_wide)
        wanted = unpacked_by_hand(case, rank)
        assert ids.dtype == (torch.int64 if case.is_wide else torch.int32)
        assert (ids.tolist(), offsets.diff().tolist(), weights.tolist()) == wanted
        assert offsets[0] == 0


@pytest.mark.parametrize("mode", [PARTIALS, ROWS])
@pytest.mark.parametrize("longest", [0, 30])
def test_large_messages_are_unpacked_as_by_the_reference(longest, mode):
    case = large_case(longest, mode, 2, is_weighted=True)
    arguments = (*arrived(case, 1), True, False)
    actual, wanted = unpack(*arguments), reference.unpack(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.skipif(not library.is_compiled, reason="the reference trusts its input")
@pytest.mark.parametrize(
    ("counts", "size", "text"),
    [
        ([[[2, 2]]], 16, "counts name 8 bytes"),
        ([[[2, 5]]], 24, "counts name 32 bytes"),
        ([[[-1, 2]]], 8, "negative"),
        ([[[3, 2]]], 24, "lengths from rank 0 do not fit"),
    ],
)
def test_a_message_that_its_counts_do_not_describe_is_refused(counts, size, text):
    message = torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=text):
        unpack(message, torch.tensor(counts), torch.tensor([PARTIALS]), False, False)


def test_route_and_unpack_pass_opcheck():
    case = large_case(3, PARTIALS, 2, is_weighted=True)
    arguments = (case.ids, case.offsets, case.weights, True, case.bags, *case.routes, 0, False)
    torch.library.opcheck(torch.ops.shardwise.route.default, arguments)
    arguments = (*arrived(case, 0), True, False)
    torch.library.opcheck(torch.ops.shardwise.unpack.default, arguments)
