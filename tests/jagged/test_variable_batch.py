import pytest
import torch

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor, kjt_is_equal

INVERSE = (["b", "a"], torch.tensor([[0, 0, 0], [1, 0, 1]]))


def example(inverse=INVERSE) -> KeyedJaggedTensor:
    """a: [0], [1, 2] for two samples; b: [3, 4, 5] for one."""
    return KeyedJaggedTensor(
        ["a", "b"],
        torch.arange(6),
        torch.arange(6) / 10,
        torch.tensor([1, 2, 3]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=inverse,
    )


def test_layout_follows_the_strides_of_each_key() -> None:
    kjt = example()
    assert kjt.variable_stride_per_key()
    assert kjt.stride_per_key() == [2, 1]
    assert kjt.stride_per_key_per_rank() == [[2], [1]]
    assert kjt.lengths_offset_per_key() == [0, 2, 3]
    assert kjt.length_per_key() == [3, 3]


def test_stride_is_that_of_the_full_batch() -> None:
    assert example().stride() == 3


def test_stride_without_inverse_indices_is_the_largest() -> None:
    assert example(inverse=None).stride() == 2


def test_strides_of_several_ranks_add_up() -> None:
    kjt = KeyedJaggedTensor(
        ["a", "b"],
        torch.arange(3),
        lengths=torch.tensor([1, 0, 1, 1]),
        stride_per_key_per_rank=torch.tensor([[1, 2], [0, 1]]),
    )
    assert kjt.stride_per_key() == [3, 1]
    assert kjt.stride_per_key_per_rank() == [[1, 2], [0, 1]]


def test_getitem_cuts_by_stride() -> None:
    assert example()["a"].lengths().tolist() == [1, 2]
    assert example()["b"].values().tolist() == [3, 4, 5]


@pytest.mark.parametrize("indices", [[1, 0], [1], [0, 0, 1]], ids=str)
def test_permute_keeps_strides_and_inverse_indices(indices: list[int]) -> None:
    kjt = example().permute(indices)
    assert kjt.stride_per_key() == [[2, 1][i] for i in indices]
    assert kjt.inverse_indices() is INVERSE
    assert kjt.stride() == 3
    assert kjt["b"].values().tolist() == [3, 4, 5]


def test_split_keeps_strides_and_inverse_indices() -> None:
    left, right = example().split([1, 1])
    assert (left.stride_per_key(), right.stride_per_key()) == ([2], [1])
    assert left.inverse_indices() is INVERSE
    assert right["b"].lengths().tolist() == [3]


def test_moving_moves_inverse_indices() -> None:
    moved = example().to("meta")
    assert moved.inverse_indices()[1].device.type == "meta"
    assert moved.stride_per_key() == [2, 1]


def test_concat_joins_strides_and_inverse_indices() -> None:
    other = KeyedJaggedTensor(
        ["c"],
        torch.arange(2),
        torch.ones(2),
        torch.tensor([2]),
        stride_per_key_per_rank=[[1]],
        inverse_indices=(["c"], torch.zeros(1, 3, dtype=torch.int64)),
    )
    joined = KeyedJaggedTensor.concat([example(), other])
    assert joined.stride_per_key() == [2, 1, 1]
    assert joined.inverse_indices()[0] == ["b", "a", "c"]
    assert joined.inverse_indices()[1].shape == (3, 3)
    joined.validate()


def test_concat_refuses_a_mix_of_inverse_indices() -> None:
    with pytest.raises(ValueError, match="some tensors have inverse indices"):
        KeyedJaggedTensor.concat([example(), example(inverse=None)])


def test_jagged_tensors_of_unequal_batches_become_variable() -> None:
    kjt = KeyedJaggedTensor.from_jt_dict(
        {
            "a": JaggedTensor(torch.arange(3), lengths=torch.tensor([1, 2])),
            "b": JaggedTensor(torch.arange(1), lengths=torch.tensor([1])),
        }
    )
    assert kjt.stride_per_key_per_rank() == [[2], [1]]
    assert kjt_is_equal(KeyedJaggedTensor.from_jt_dict(kjt.to_dict()), kjt)
