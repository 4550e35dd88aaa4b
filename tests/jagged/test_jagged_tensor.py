import copy
import pickle

import pytest
import torch

from shardwise.jagged import JaggedTensor, jt_is_equal


def example(is_weighted: bool = True) -> JaggedTensor:
    """Bags [0], [], [1, 2, 3]; weights a tenth of each value."""
    values = torch.arange(4)
    weights = values / 10 if is_weighted else None
    return JaggedTensor(values, weights, lengths=torch.tensor([1, 0, 3], dtype=torch.int32))


def test_offsets_follow_from_lengths_and_are_kept() -> None:
    jagged = example()
    assert jagged.offsets_or_none() is None
    assert jagged.offsets().tolist() == [0, 1, 1, 4]
    assert jagged.offsets_or_none() is jagged.offsets()


def test_lengths_follow_from_offsets_and_are_kept() -> None:
    jagged = JaggedTensor(torch.arange(4), offsets=torch.tensor([0, 1, 1, 4]))
    assert jagged.lengths_or_none() is None
    assert jagged.lengths().tolist() == [1, 0, 3]
    assert jagged.lengths_or_none() is jagged.lengths()


def test_neither_lengths_nor_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match="needs lengths or offsets"):
        JaggedTensor(torch.arange(4))


@pytest.mark.parametrize("name", ["lengths", "offsets"])
def test_float_row_splits_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be of an integer dtype, got torch.float32"):
        JaggedTensor(torch.arange(4), **{name: torch.ones(2)})


def test_empty_float_lengths_are_allowed() -> None:
    assert JaggedTensor(torch.empty(0), lengths=torch.empty(0)).to_dense() == []


def test_missing_weights_are_named() -> None:
    with pytest.raises(ValueError, match="it has no weights"):
        example(is_weighted=False).weights()
    assert example(is_weighted=False).weights_or_none() is None


def test_dense_bags_round_trip() -> None:
    bags = [torch.tensor([1.0]), torch.empty(0), torch.tensor([2.0, 3.0])]
    jagged = JaggedTensor.from_dense(bags, [bag * 2 for bag in bags])
    assert jagged.lengths().dtype == torch.int32
    assert [bag.tolist() for bag in jagged.to_dense()] == [[1], [], [2, 3]]
    assert [bag.tolist() for bag in jagged.to_dense_weights()] == [[2], [], [4, 6]]


def test_dense_rows_keep_their_heads() -> None:
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    jagged = JaggedTensor.from_dense_lengths(rows, torch.tensor([1, 3]), rows * 0.5)
    assert jagged.values().tolist() == [1, 4, 5, 6]
    assert jagged.weights().tolist() == [0.5, 2, 2.5, 3]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, [[0, 9, 9], [9, 9, 9], [1, 2, 3]]),
        (2, [[0, 9], [9, 9], [1, 2]]),
        (0, [[], [], []]),
    ],
)
def test_padded_rows_are_cut_and_filled(width: int | None, expected: list[list[int]]) -> None:
    assert example().to_padded_dense(width, padding_value=9).tolist() == expected


def test_padded_weights_are_padded_with_zeros() -> None:
    rows = example().to_padded_dense_weights(2)
    torch.testing.assert_close(rows, torch.tensor([[0, 0], [0, 0], [0.1, 0.2]]))


def test_padded_rows_of_vectors_carry_gradients() -> None:
    values = torch.ones(4, 2, requires_grad=True)
    JaggedTensor(values, lengths=torch.tensor([1, 0, 3])).to_padded_dense(2).sum().backward()
    assert values.grad[:, 0].tolist() == [1, 1, 1, 0]


def test_no_values_pad_to_padding_only() -> None:
    jagged = JaggedTensor(torch.empty(0), lengths=torch.zeros(2, dtype=torch.int64))
    assert jagged.to_padded_dense(2, 7.0).tolist() == [[7, 7], [7, 7]]
    assert jagged.to_padded_dense().shape == (2, 0)


@pytest.mark.parametrize("is_weighted", [True, False])
def test_empty_has_no_bags(is_weighted: bool) -> None:
    jagged = JaggedTensor.empty(is_weighted, values_dtype=torch.int64)
    assert jagged.lengths().tolist() == []
    assert jagged.offsets().tolist() == [0]
    assert (jagged.weights_or_none() is not None) == is_weighted


def test_copy_fills_what_empty_like_allocates() -> None:
    source = example()
    target = JaggedTensor.empty_like(source)
    assert jt_is_equal(target.copy_(source), source)
    assert target.values().data_ptr() != source.values().data_ptr()


def test_copy_of_another_shape_names_the_field() -> None:
    other = JaggedTensor(torch.arange(3), torch.ones(3), lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"copy_: values has shape \(4,\) here, \(3,\)"):
        example().copy_(other)


def test_size_in_bytes_counts_all_fields() -> None:
    assert example().size_in_bytes() == 4 * 8 + 4 * 4 + 3 * 4


def test_clear_storage_frees_the_values() -> None:
    jagged = example()
    jagged.clear_storage()
    assert jagged.values().untyped_storage().nbytes() == 0


def test_to_moves_every_field() -> None:
    moved = example().to(torch.device("meta"))
    assert moved.device().type == "meta"
    assert moved.weights().device.type == "meta"
    assert moved.lengths().device.type == "meta"


@pytest.mark.parametrize(
    "duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_pickled_and_copied_tensors_are_equal(duplicate) -> None:
    assert jt_is_equal(duplicate(example()), example())


def test_equality_sees_every_field() -> None:
    base = example()
    others = [
        example(is_weighted=False),
        JaggedTensor(base.values() + 1, base.weights(), base.lengths()),
        JaggedTensor(base.values(), base.weights() + 1, base.lengths()),
        JaggedTensor(base.values(), base.weights(), torch.tensor([0, 1, 3])),
        JaggedTensor(base.values().int(), base.weights(), base.lengths()),
    ]
    assert jt_is_equal(base, example())
    assert not any(jt_is_equal(base, other) for other in others)


def test_repr_shows_bags() -> None:
    text = repr(example(is_weighted=False))
    assert text == "JaggedTensor(3 bags, 4 values int64, cpu) [[0], [], [1, 2, 3]]"


def test_repr_works_without_data() -> None:
    assert "(no data)" in repr(example().to("meta"))
