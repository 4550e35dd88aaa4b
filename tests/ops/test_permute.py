import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.ops.library import is_compiled
from shardwise.ops.permute import permute_segments, reference

ORDERS = [[0, 1, 2], [2, 0, 1], [1, 1, 0, 2], [2], []]
OPERATOR = torch.ops.shardwise.permute_segments.default


def make(bags: list[int], lengths_dtype=torch.int64, dtype=torch.float32):
    lengths = torch.randint(0, 4, (sum(bags),), dtype=lengths_dtype)
    counts = [int(part.sum()) for part in lengths.split(bags)]
    values = torch.randint(0, 100, (sum(counts),))
    weights = torch.rand(sum(counts)).to(dtype).requires_grad_()
    return lengths, values, weights, counts


def check(bags: list[int], order: list[int], lengths_dtype=torch.int64, dtype=torch.float32):
    lengths, values, weights, counts = make(bags, lengths_dtype, dtype)
    fast = permute_segments(lengths, values, weights, order, bags, counts)
    plain = reference.permute_segments(lengths, values, weights, True, order, bags, counts)
    for left, right in zip(fast, reversed(plain), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    grad = torch.rand(plain[0].shape).to(dtype)
    expected = torch.autograd.grad(plain[0], weights, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(fast[2], weights, grad)[0], expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 63, 1000])
def test_permute_and_its_gradient_equal_the_reference(batch: int, order: list[int]) -> None:
    check([batch] * 3, order, torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    check([5] * 3, [2, 0, 1], dtype=dtype)


def test_segments_may_hold_different_numbers_of_bags() -> None:
    check([5, 0, 63], [2, 0, 1])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_any_order_equals_the_reference(bags: list[int], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(bags) - 1), max_size=8))
    check(bags, order)


def test_counts_are_found_for_a_permutation() -> None:
    lengths, values, _, _ = make([5000] * 3)
    given_counts = permute_segments(lengths, values, None, [2, 0, 1], [5000] * 3)
    plain = reference.permute_segments(
        lengths, values, torch.empty(0), False, [2, 0, 1], [5000] * 3, [-1] * 3
    )
    assert torch.equal(given_counts[1], plain[1])
    assert given_counts[2] is None


def test_values_may_have_more_dimensions() -> None:
    lengths, values = torch.tensor([1, 2]), torch.arange(6).reshape(3, 2)
    permuted = permute_segments(lengths, values, None, [1, 0], [1, 1])
    assert permuted[1].tolist() == [[2, 3], [4, 5], [0, 1]]


def test_repeated_segment_sums_its_gradients() -> None:
    weights = torch.ones(3, requires_grad=True)
    lengths, values = torch.tensor([1, 2]), torch.arange(3)
    result = permute_segments(lengths, values, weights, [1, 1], [1, 1], [1, 2])[2]
    result.sum().backward()
    assert weights.grad.tolist() == [0, 2, 2]


def test_other_orders_need_counts() -> None:
    lengths, values, _, _ = make([2] * 3)
    with pytest.raises(ValueError, match=r"order \[0, 0\] is no permutation of 3 segments"):
        permute_segments(lengths, values, None, [0, 0], [2] * 3)


@pytest.mark.skipif(not is_compiled, reason="the reference trusts its input")
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], "the segments need 3 values, there are 4"),
        ([-1, 5], "segment 0 has -1 values"),
        ([2**62 + 2, -(2**62)], "segment 0 has 4611686018427387906 values, there are 4"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        permute_segments(torch.tensor(lengths), torch.arange(4), None, [1, 0], [1, 1])


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0], [2]], ids=str)
def test_permute_passes_opcheck(order: list[int]) -> None:
    bags = [3, 1, 4]
    lengths, values, weights, counts = make(bags)
    torch.library.opcheck(OPERATOR, (lengths, values, weights, True, order, bags, counts))


@pytest.mark.parametrize("counts", [[-1], [3, 3, 3]], ids=["unknown", "known"])
def test_one_number_of_bags_holds_for_all_segments(counts: list[int]) -> None:
    lengths, values = torch.tensor([1, 2, 3, 0, 2, 1]), torch.arange(9)
    arguments = (lengths, values, torch.empty(0), False, [2, 0, 1])
    packed = OPERATOR(*arguments, [2], counts)
    for left, right in zip(packed, OPERATOR(*arguments, [2, 2, 2], [3, 3, 3]), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(
        packed, reference.permute_segments(*arguments, [2], counts), strict=True
    ):
        assert torch.equal(left, right)
