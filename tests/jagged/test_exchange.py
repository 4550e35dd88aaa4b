import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor, kjt_is_equal


def make(rank: int, batch: int, is_weighted: bool, strides: list[int] | None) -> KeyedJaggedTensor:
    """Keys a, b, c of one rank; with `strides`, as many samples of each."""
    generator = torch.Generator().manual_seed(rank)
    num_bags = sum(strides) if strides else 3 * batch
    lengths = torch.randint(0, 4, (num_bags,), generator=generator)
    values = torch.randint(0, 100, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(
        ["a", "b", "c"],
        values,
        values / 10 if is_weighted else None,
        lengths,
        stride_per_key_per_rank=[[s] for s in strides] if strides else None,
    )


def send(inputs: list[KeyedJaggedTensor], key_splits: list[int], to: int) -> list[torch.Tensor]:
    """Give what rank `to` receives of each tensor, joined over the sources."""
    parts = [
        [t.split(s)[to] for t, s in zip(k.dist_tensors(), k.dist_splits(key_splits), strict=True)]
        for k in inputs
    ]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def expected(inputs: list[KeyedJaggedTensor], key: str) -> list[list[int]]:
    return [bag.tolist() for kjt in inputs for bag in kjt[key].to_dense()]


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("batches", [[2, 2], [3, 0, 1], [4]], ids=str)
@pytest.mark.parametrize("is_variable", [True, False])
def test_each_rank_receives_its_keys_from_all(
    batches: list[int], is_weighted: bool, is_variable: bool
) -> None:
    inputs = [
        make(r, b, is_weighted, [b, b + 1, 2] if is_variable else None)
        for r, b in enumerate(batches)
    ]
    for to, keys in enumerate([["a", "b"], [], ["c"]]):
        kjt = KeyedJaggedTensor.dist_init(
            keys,
            send(inputs, [2, 0, 1], to),
            is_variable,
            len(batches),
            stride_per_rank=None if is_variable else batches,
        )
        kjt.validate()
        assert kjt.keys() == keys
        assert (kjt.weights_or_none() is not None) == is_weighted
        assert {k: [b.tolist() for b in kjt[k].to_dense()] for k in keys} == {
            k: expected(inputs, k) for k in keys
        }


def test_labels_name_what_is_sent() -> None:
    assert make(0, 2, False, None).dist_labels() == ["lengths", "values"]
    labels = make(0, 0, True, [1, 2, 3]).dist_labels()
    assert labels == ["lengths", "values", "strides", "weights"]


def test_strides_of_each_rank_are_told() -> None:
    inputs = [make(r, 0, False, [r + 1, 2, 1]) for r in range(2)]
    received = send(inputs, [2, 1], 0)
    kjt = KeyedJaggedTensor.dist_init(["a", "b"], received, True, 2)
    assert kjt.stride_per_key_per_rank() == [[1, 2], [2, 2]]


def test_given_order_is_the_derived_one() -> None:
    inputs = [make(r, 2, True, None) for r in range(2)]
    received = send(inputs, [3], 0)
    keys = inputs[0].keys()
    derived = KeyedJaggedTensor.dist_init(keys, received, False, 2)
    recat = torch.tensor([0, 3, 1, 4, 2, 5])
    given = KeyedJaggedTensor.dist_init(keys, received, False, 2, recat, stride_per_rank=[2, 2])
    assert kjt_is_equal(derived, given)


def test_order_may_be_given_bag_by_bag() -> None:
    inputs = [make(0, 1, False, None), make(1, 2, False, None)]
    received = send(inputs, [3], 0)
    recat = torch.tensor([0, 3, 4, 1, 5, 6, 2, 7, 8])
    keys = inputs[0].keys()
    given = KeyedJaggedTensor.dist_init(keys, received, False, 2, recat, stride_per_rank=[1, 2])
    derived = KeyedJaggedTensor.dist_init(keys, received, False, 2, stride_per_rank=[1, 2])
    assert kjt_is_equal(derived, given)


def test_stagger_interleaves_the_ranks() -> None:
    inputs = [make(r, 1, False, None) for r in range(4)]
    received = send(inputs, [3], 0)
    kjt = KeyedJaggedTensor.dist_init(inputs[0].keys(), received, False, 4, stagger=2)
    order = [inputs[r] for r in (0, 2, 1, 3)]
    assert [bag.tolist() for bag in kjt["b"].to_dense()] == expected(order, "b")
