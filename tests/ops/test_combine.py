"""Answers are put together as a loop over all bags would, and their gradients are autograd's."""

from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.ops import library
from shardwise.ops.combine import Call, combine, combine_grad, combine_weight_grads, reference
from shardwise.ops.lookup import Pooling
from shardwise.ops.route import PARTIALS, ROWS, Routes, route

NO_WEIGHTS = torch.empty(0)
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A call, with an answer and the shape of the output."""

    call: Call
    answer: Tensor
    rows: int
    width: int

    def grad(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(self.rows, self.width, generator=generator)


@dataclass(frozen=True)
class Split:
    """One input read through one cutting of the rows, and the entries of each of its bags."""

    key: int
    mode: int
    num_slots: int
    entries: list[Pairs]

    def count(self, slot: int) -> int:
        """Give how many vectors a slot has."""
        return max((p + 1 for bag in self.entries for s, p in bag if s == slot), default=0)


def draw_entries(draw: Random, mode: int, lengths: list[int], num_slots: int) -> list[Pairs]:
    """Draw the entries of each bag as `route` could have found them."""
    counts, bags = [0] * num_slots, []
    for length in lengths:
        slots = draw.choices(range(num_slots), k=length)
        pairs = []
        for slot in sorted(set(slots)) if mode == PARTIALS else slots:
            if mode == ROWS and draw.random() < 0.1:
                pairs.append((-1, 0))
            elif mode == ROWS and counts[slot] and draw.random() < 0.4:
                pairs.append((slot, draw.randrange(counts[slot])))
            else:
                pairs.append((slot, counts[slot]))
                counts[slot] += 1
        bags.append(pairs)
    return bags


def draw_stripes(draw: Random, splits: list[Split], columns: bool) -> list[list[int]]:
    """Draw features of one to three column blocks; bases are those of `lay_answer`."""
    stripes, first_base = [], 0
    for feature in range(draw.randint(1, 4)):
        key = draw.choice(splits).key
        pooling = draw.choice([Pooling.SUM, Pooling.MEAN] + [Pooling.NONE] * (not columns))
        widths = [draw.choice([1, 3, 4, 16, 17, 33]) for _ in range(draw.randint(1, 3))]
        own = [n for n, split in enumerate(splits) if split.key == key]
        own = [n for n in own if splits[n].mode == ROWS or pooling != Pooling.NONE]
        for column, width in zip(accumulate(widths, initial=0), widths, strict=False):
            split = draw.choice(own)
            stripes.append([split, pooling, feature, column, width, first_base, sum(widths)])
            first_base += splits[split].num_slots
    return draw.sample(stripes, len(stripes))


def lay_answer(draw: Random, splits: list[Split], stripes: list[list[int]]) -> tuple[Tensor, int]:
    """Give where the vectors of each slot of each stripe begin, in any order, and the size."""
    sizes = {
        first_base + slot: splits[split].count(slot) * width
        for split, _, _, _, width, first_base, _ in stripes
        for slot in range(splits[split].num_slots)
    }
    bases, size = torch.zeros(len(sizes), dtype=torch.int64), 0
    for base in draw.sample(sorted(sizes), len(sizes)):
        bases[base] = size
        size += sizes[base]
    return bases, size


def make_call(
    splits: list[Split], stripes: Any, bases: Tensor, offsets: Tensor, bags: Tensor, **more: Any
) -> Call:
    every = [bag for split in splits for bag in split.entries]
    pairs = [pair for bag in every for pair in bag]
    weights = more.get("weights", NO_WEIGHTS)
    return Call(
        bases,
        torch.tensor(pairs, dtype=torch.int32).view(-1, 2),
        torch.tensor([0, *map(len, every)]).cumsum(0),
        offsets,
        weights,
        weights is not NO_WEIGHTS,
        bags,
        torch.tensor(
            [[s.key, s.mode, 0, 1, 0, s.num_slots] for s in splits], dtype=torch.int64
        ).view(-1, 6),
        torch.tensor(stripes, dtype=torch.int64).view(-1, 7),
        more.get("columns", False),
    )


def random_case(seed: int, most_bags: int = 5) -> Case:
    draw, generator = Random(seed), torch.Generator().manual_seed(seed)
    columns, num_inputs = draw.random() < 0.4, draw.randint(1, 3)
    sources = 1 if columns else draw.randint(1, 3)
    bags = torch.randint(0, most_bags + 1, (num_inputs, sources), generator=generator)
    bags = bags[:1].expand(num_inputs, 1).contiguous() if columns else bags
    lengths = torch.randint(0, 4, (int(bags.sum()),), generator=generator)
    runs = list(lengths.split(bags.t().flatten().tolist()))
    splits = []
    for key in range(num_inputs):
        own = torch.cat(runs[key::num_inputs]).tolist()
        for mode in draw.choice([(ROWS,), (PARTIALS, ROWS), (PARTIALS, ROWS, PARTIALS)]):
            slots = draw.randint(1, 5)
            splits.append(Split(key, mode, slots, draw_entries(draw, mode, own, slots)))
    stripes = draw_stripes(draw, splits, columns)
    bases, size = lay_answer(draw, splits, stripes)
    weights = torch.rand(int(lengths.sum()), generator=generator)
    weights = weights if draw.random() < 0.6 else NO_WEIGHTS
    offsets = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0)
    offsets = offsets.int() if draw.random() < 0.3 else offsets
    call = make_call(splits, stripes, bases, offsets, bags, weights=weights, columns=columns)
    answer = torch.randn(size, generator=generator)
    blocks = plain_blocks(call, answer, weights)
    if columns:
        return Case(call, answer, int(bags[0, 0]), sum(block.shape[1] for block in blocks))
    return Case(call, answer, sum(block.numel() for block in blocks), 1)


def plain_bag(call: Call, stripe: list[int], bag: int, number: int, source: Any) -> list[Tensor]:
    """Give the rows that bag `number` of the call, `bag` of all splits, makes for a stripe."""
    split, pooling, _, _, width, first_base, _ = stripe
    begin, end = call.offsets[number : number + 2].tolist()
    first, last = call.entry_offsets[bag : bag + 2].tolist()
    answer, weights = source
    vectors = []
    for n, (slot, position) in enumerate(call.entries[first:last].tolist()):
        start = int(call.bases[first_base + slot]) + position * width
        vector = answer[start : start + width] if slot >= 0 else torch.zeros(width)
        is_weighted = call.is_weighted and int(call.splits[split, 1]) == ROWS
        vectors.append(vector * weights[begin + n] if is_weighted else vector)
    if pooling == Pooling.NONE:
        return vectors
    total = torch.stack(vectors).sum(0) if vectors else torch.zeros(width)
    return [total / max(1, end - begin) if pooling == Pooling.MEAN else total]


def plain_blocks(call: Call, answer: Tensor, weights: Tensor) -> list[Tensor]:
    """Give the rows of each feature of each source, one bag and one entry at a time."""
    num_bags = call.bags.sum(1)[call.splits[:, 0]].tolist()
    first_bags = list(accumulate(num_bags, initial=0))
    numbers = torch.arange(int(call.bags.sum())).split(call.bags.t().flatten().tolist())
    blocks = []
    for source in range(call.bags.shape[1]):
        for feature in sorted(set(call.stripes[:, 2].tolist())):
            parts = []
            for stripe in sorted(call.stripes.tolist(), key=lambda stripe: stripe[3]):
                if stripe[2] == feature:
                    key = int(call.splits[stripe[0], 0])
                    own = numbers[source * len(call.bags) + key].tolist()
                    bag = first_bags[stripe[0]] + int(call.bags[key, :source].sum())
                    rows = [
                        row
                        for n, number in enumerate(own)
                        for row in plain_bag(call, stripe, bag + n, number, (answer, weights))
                    ]
                    parts.append(torch.stack(rows) if rows else torch.zeros(0, stripe[4]))
            blocks.append(torch.cat(parts, 1))
    return blocks


def plain(case: Case, answer: Tensor, weights: Tensor) -> Tensor:
    blocks = plain_blocks(case.call, answer, weights)
    if case.call.columns:
        return torch.cat(blocks, 1)
    return torch.cat([block.flatten() for block in blocks]).view(case.rows, case.width)


def run_all(case: Case) -> list[Tensor]:
    grad = case.grad()
    return [
        combine(case.answer, *case.call, case.rows, case.width),
        combine_grad(grad, *case.call, case.answer.numel(), 0.25),
        combine_weight_grads(grad, case.answer, *case.call),
    ]


def run_reference(case: Case) -> list[Tensor]:
    grad = case.grad()
    return [
        reference.combine(case.answer, *case.call, case.rows, case.width),
        reference.combine_grad(grad, *case.call, case.answer.numel(), 0.25),
        reference.combine_weight_grads(grad, case.answer, *case.call),
    ]


def run_plain(case: Case) -> list[Tensor]:
    answer = case.answer.clone().requires_grad_()
    weights = case.call.weights.clone().requires_grad_()
    out = plain(case, answer, weights)
    loss = (out * case.grad()).sum() + 0 * (answer.sum() + weights.sum())
    grads = torch.autograd.grad(loss, [answer, weights])
    return [out.detach(), grads[0] * 0.25, grads[1]]


@pytest.mark.parametrize("seed", range(40))
def test_results_are_those_of_a_loop_over_all_bags_and_of_autograd(seed: int) -> None:
    case = random_case(seed)
    wanted = run_plain(case)
    torch.testing.assert_close(run_all(case), wanted)
    torch.testing.assert_close(run_reference(case), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 600))
def test_results_are_those_of_a_loop_in_many_cases(seed: int) -> None:
    case = random_case(seed, most_bags=20)
    torch.testing.assert_close(run_all(case), run_plain(case))


def routed_case(
    mode: int, num_rows: int, lengths: Tensor, poolings: tuple[Pooling, ...], **more: Any
) -> Case:
    """Route random ids of one input to four ranks, and make up an answer for two column blocks."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0)
    ids = torch.randint(0, num_rows, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(ids.shape, generator=generator) if more.get("is_weighted") else NO_WEIGHTS
    bags, ranks = torch.tensor([[len(lengths)]]), 4
    ends = [num_rows * (rank + 1) // ranks for rank in range(ranks)]
    blocks = torch.tensor([[end, rank, 0] for rank, end in enumerate(ends)])
    splits = torch.tensor([[0, mode, 0, ranks, 0, ranks]])
    routes = Routes(splits, blocks, torch.arange(ranks), torch.arange(ranks + 1))
    routed = route(ids, offsets, weights, weights is not NO_WEIGHTS, bags, routes, 0, False)
    counts = routed.counts[:, mode]
    stripes, size = [], 0
    bases: list[int] = []
    for feature, pooling in enumerate(poolings):
        for column, width in ((0, 20), (20, 16)):
            stripes.append([0, pooling, feature, column, width, len(bases), 36])
            bases += [size + width * n for n in (0, *counts.cumsum(0).tolist()[:-1])]
            size += width * int(counts.sum())
    call = Call(
        torch.tensor(bases),
        routed.entries,
        routed.entry_offsets,
        offsets,
        weights,
        weights is not NO_WEIGHTS,
        bags,
        splits,
        torch.tensor(stripes),
        more.get("columns", True),
    )
    rows = len(ids) if poolings[0] == Pooling.NONE else len(lengths)
    return Case(call, torch.randn(size, generator=generator), rows, 36 * len(poolings))


LARGE = [
    (PARTIALS, 5000, (Pooling.SUM, Pooling.MEAN), False),
    (PARTIALS, 5000, (Pooling.MEAN, Pooling.SUM), True),
    (ROWS, 5000, (Pooling.SUM, Pooling.MEAN), False),
    (ROWS, 9, (Pooling.SUM, Pooling.MEAN), True),
    (ROWS, 5000, (Pooling.NONE,), True),
]


@pytest.mark.parametrize(("mode", "num_rows", "poolings", "is_weighted"), LARGE)
@pytest.mark.parametrize("longest", [1, 40])
def test_large_calls_give_the_same_bits_on_any_number_of_threads(
    mode: int, num_rows: int, poolings: tuple[Pooling, ...], is_weighted: bool, longest: int
) -> None:
    lengths = torch.randint(0, longest + 1, (4000,), generator=torch.Generator().manual_seed(1))
    case = routed_case(mode, num_rows, lengths, poolings, is_weighted=is_weighted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_all(case)
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for a, b in zip(run_all(case), one, strict=True))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, run_reference(case), rtol=1e-4, atol=1e-4)


def test_columns_and_blocks_hold_the_same_numbers() -> None:
    case = routed_case(PARTIALS, 100, torch.arange(5), (Pooling.SUM, Pooling.MEAN))
    out = combine(case.answer, *case.call, case.rows, case.width)
    blocks = combine(case.answer, *case.call._replace(columns=False), 2 * case.rows, 36)
    assert torch.equal(torch.cat(blocks.chunk(2), 1), out)


def test_vectors_are_added_in_order_of_the_entries() -> None:
    splits = [Split(0, ROWS, 1, [[(0, 0), (0, 1), (0, 2)]])]
    offsets, bags = torch.tensor([0, 3]), torch.tensor([[1]])
    call = make_call(splits, [[0, 0, 0, 0, 1, 0, 1]], torch.tensor([0]), offsets, bags)
    answer = torch.tensor([1e8, -1e8, 1.0])
    assert combine(answer, *call, 1, 1).item() == 1.0
    assert combine(answer[[0, 2, 1]], *call, 1, 1).item() == 0.0


@pytest.mark.parametrize("pooling", [Pooling.SUM, Pooling.MEAN])
def test_a_bag_without_entries_is_zero(pooling: Pooling) -> None:
    splits = [Split(0, PARTIALS, 2, [[], [(1, 0)], []])]
    offsets, bags = torch.tensor([0, 0, 1, 2]), torch.tensor([[3]])
    call = make_call(splits, [[0, pooling, 0, 0, 2, 0, 2]], torch.tensor([9, 0]), offsets, bags)
    out = combine(torch.tensor([3.0, 4.0]), *call, 3, 2)
    assert out.tolist() == [[0, 0], [3, 4], [0, 0]]


def test_without_bags_or_stripes_there_is_nothing() -> None:
    offsets, none = torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64)
    no_bases = torch.empty(0, dtype=torch.int64)
    call = make_call([], [], no_bases, offsets, none)
    assert [result.shape for result in run_all(Case(call, torch.empty(0), 0, 4))] == [
        (0, 4),
        (0,),
        (0,),
    ]
    call = make_call(
        [Split(0, ROWS, 1, [])], [[0, 2, 0, 0, 4, 0, 4]], torch.tensor([0]), offsets, none
    )
    assert combine(torch.empty(0), *call, 0, 4).shape == (0, 4)


def small_case(**changes: Any) -> Case:
    """Make a case of two bags, (slot 0) and (slots 0 and 1), and one stripe of two columns."""
    splits = [Split(0, PARTIALS, 2, [[(0, 0)], [(0, 1), (1, 0)]])]
    offsets, bags = torch.tensor([0, 1, 3]), torch.tensor([[2]])
    call = make_call(splits, [[0, 0, 0, 0, 2, 0, 2]], torch.tensor([0, 4]), offsets, bags)
    case = Case(call, torch.arange(6.0), 2, 2)
    own = {name: changes.pop(name) for name in tuple(changes) if hasattr(case, name)}
    return replace(case, call=call._replace(**changes), **own)


def test_columns_that_no_stripe_fills_are_zero() -> None:
    case = small_case(stripes=torch.tensor([[0, 0, 0, 1, 2, 0, 4]]))
    out = combine(case.answer, *case.call, 2, 4)
    assert out.tolist() == [[0, 0, 1, 0], [0, 6, 8, 0]]


def test_elements_of_the_answer_that_nothing_reads_have_no_gradient() -> None:
    case = small_case(bases=torch.tensor([1, 6]))
    grad = combine_grad(torch.ones(2, 2), *case.call, 9, 0.5)
    assert grad.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0]


def test_stripes_that_share_vectors_add_their_gradients() -> None:
    stripes = torch.tensor([[0, 0, 0, 0, 2, 0, 2], [0, 0, 1, 0, 2, 0, 2]])
    case = small_case(stripes=stripes, columns=True)
    grad = combine_grad(torch.tensor([[1.0, 2, 10, 20], [3, 4, 30, 40]]), *case.call, 6, 1.0)
    assert grad.tolist() == [11, 22, 33, 44, 33, 44]


CONTRADICTIONS = [
    ({"entries": torch.tensor([[0, 0], [0, 1], [2, 0]], dtype=torch.int32)}, "entry of split 0"),
    ({"entries": torch.tensor([[0, 0], [0, 1], [-2, 0]], dtype=torch.int32)}, "entry of split 0"),
    ({"entries": torch.tensor([[0, 0], [0, 1], [1, -1]], dtype=torch.int32)}, "entry of split 0"),
    ({"entries": torch.tensor([[0, 0], [0, 9], [1, 0]], dtype=torch.int32)}, "within the answer"),
    ({"bases": torch.tensor([0, 5])}, "within the answer"),
    ({"bases": torch.tensor([-1, 4])}, "within the answer"),
    ({"bases": torch.tensor([0])}, "bases"),
    ({"entry_offsets": torch.tensor([0, 2, 1])}, "entry_offsets"),
    ({"entry_offsets": torch.tensor([0, 1, 2])}, "entry_offsets"),
    ({"entry_offsets": torch.tensor([0, 3])}, "2 bags"),
    ({"offsets": torch.tensor([0, 3, 1])}, "never decrease"),
    ({"bags": torch.tensor([[3]])}, "bags"),
    ({"splits": torch.tensor([[1, 0, 0, 1, 0, 2]])}, "no input 1"),
    ({"splits": torch.tensor([[0, 2, 0, 1, 0, 2]])}, "mode 2"),
    ({"splits": torch.tensor([[0, 1, 0, 1, 0, 2]]), "offsets": torch.tensor([0, 2, 3])}, "each id"),
    ({"stripes": torch.tensor([[1, 0, 0, 0, 2, 0, 2]])}, "no split 1"),
    ({"stripes": torch.tensor([[0, 3, 0, 0, 2, 0, 2]])}, "unknown pooling"),
    ({"stripes": torch.tensor([[0, 2, 0, 0, 2, 0, 2]])}, "only rows"),
    ({"stripes": torch.tensor([[0, 0, 0, 1, 2, 0, 2]])}, "columns"),
    ({"stripes": torch.tensor([[0, 0, 0, 0, 1, 0, 2], [0, 1, 0, 1, 1, 0, 2]])}, "fit together"),
    ({"stripes": torch.tensor([[0, 0, 0, 0, 2, 0, 2], [0, 0, 0, 1, 1, 0, 2]])}, "fit together"),
    ({"stripes": torch.tensor([[0, 0, 0, 0, 2, 0, 3]])}, "do not fit in the output"),
    ({"columns": True, "rows": 1, "width": 4}, "feature 0 has 2 rows, not 1"),
    ({"is_weighted": True}, "0 weights for 3 ids"),
    ({"answer": torch.zeros(6, dtype=torch.float64)}, "answer must be float32"),
]


@pytest.mark.skipif(not library.is_compiled, reason="the reference trusts its input")
@pytest.mark.parametrize(("changes", "text"), CONTRADICTIONS)
def test_input_that_contradicts_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    case = small_case(**changes)
    with pytest.raises(RuntimeError, match=text):
        combine(case.answer, *case.call, case.rows, case.width)
    if case.answer.dtype == torch.float32:
        with pytest.raises(RuntimeError, match=text):
            combine_grad(case.grad(), *case.call, 6, 1.0)
        with pytest.raises(RuntimeError, match=text):
            combine_weight_grads(case.grad(), case.answer, *case.call)


@pytest.mark.parametrize("mode", [PARTIALS, ROWS])
def test_combine_and_its_gradients_pass_opcheck(mode: int) -> None:
    case = routed_case(mode, 30, torch.arange(4), (Pooling.MEAN,), is_weighted=True)
    ops = torch.ops.shardwise
    torch.library.opcheck(ops.combine.default, (case.answer, *case.call, case.rows, case.width))
    arguments = (case.grad(), *case.call, case.answer.numel(), 0.5)
    torch.library.opcheck(ops.combine_grad.default, arguments)
    torch.library.opcheck(ops.combine_weight_grads.default, (case.grad(), case.answer, *case.call))


@pytest.mark.skipif(not library.is_compiled, reason="the reference adds in another order")
@pytest.mark.parametrize("pooling", [Pooling.SUM, Pooling.MEAN])
def test_rows_and_their_weights_get_the_bits_of_a_local_lookup(pooling: Pooling) -> None:
    case = routed_case(ROWS, 50, torch.arange(9).repeat(20), (pooling,), is_weighted=True)
    call = case.call
    stripes = torch.tensor([[0, pooling, 0, 0, 36, 0, 36]])
    counts = torch.bincount(call.entries[:, 0]).cumsum(0)
    bases = 36 * torch.cat([counts[:1] * 0, counts[:-1]])
    table = torch.randn(len(call.entries), 36)
    features = torch.tensor([[0, 0, pooling, 36]])
    rows = bases[call.entries[:, 0]] // 36 + call.entries[:, 1]
    local = (rows, call.offsets, call.weights, True, features, call.bags, True, 0, [table])
    call = call._replace(stripes=stripes, bases=bases)
    out = combine(table.flatten(), *call, case.rows, 36)
    assert torch.equal(out, torch.ops.shardwise.lookup(*local, case.rows, 36))
    grads = combine_weight_grads(case.grad(), table.flatten(), *call)
    assert torch.equal(grads, torch.ops.shardwise.weight_grads(case.grad(), *local))
