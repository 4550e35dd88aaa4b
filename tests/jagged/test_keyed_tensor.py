import pickle

import pytest
import torch

from shardwise.jagged import KeyedTensor, regroup_kts


def example(rows: int = 3, requires_grad: bool = False) -> KeyedTensor:
    values = torch.arange(rows * 6.0).reshape(rows, 6).requires_grad_(requires_grad)
    return KeyedTensor(["a", "b", "c"], [1, 2, 3], values)


def other(rows: int = 3) -> KeyedTensor:
    return KeyedTensor(["d", "a"], [2, 1], -torch.ones(rows, 3))


def test_blocks_are_views_by_key() -> None:
    keyed = example()
    assert torch.equal(keyed["b"], keyed.values()[:, 1:3])
    assert keyed["c"].data_ptr() == keyed.values()[:, 3:].data_ptr()
    assert {key: block.shape[1] for key, block in keyed.to_dict().items()} == {
        "a": 1, "b": 2, "c": 3
    }  # fmt: skip


def test_layout_is_told() -> None:
    keyed = example()
    assert keyed.offset_per_key() == [0, 1, 3, 6]
    assert keyed.length_per_key() == [1, 2, 3]
    assert (keyed.keys(), keyed.key_dim()) == (["a", "b", "c"], 1)


def test_unknown_key_is_named_beside_the_known() -> None:
    with pytest.raises(KeyError, match=r"no key 'x'; it has \['a', 'b', 'c'\]"):
        example()["x"]


def test_tensors_are_joined() -> None:
    keyed = KeyedTensor.from_tensor_list(["a", "b"], [torch.ones(2, 1), torch.zeros(2, 3)])
    assert keyed.length_per_key() == [1, 3]
    assert keyed["b"].tolist() == [[0, 0, 0]] * 2


def test_blocks_may_lie_along_another_dimension() -> None:
    keyed = KeyedTensor.from_tensor_list(
        ["a", "b"], [torch.ones(1, 4), torch.zeros(2, 4)], key_dim=0, cat_dim=0
    )
    assert keyed["b"].shape == (2, 4)
    assert KeyedTensor.regroup([keyed], [["b", "a"]])[0][:, 0].tolist() == [0, 0, 1]


def test_regroup_joins_blocks_of_several_tensors() -> None:
    keyed, more = example(), other()
    groups = KeyedTensor.regroup([keyed, more], [["c", "d"], ["b"], ["b", "a", "b"]])
    assert torch.equal(groups[0], torch.cat([keyed["c"], more["d"]], 1))
    assert torch.equal(groups[1], keyed["b"])
    assert torch.equal(groups[2], torch.cat([keyed["b"], keyed["a"], keyed["b"]], 1))


def test_key_of_several_tensors_is_taken_from_the_first() -> None:
    assert torch.equal(regroup_kts([other(), example()], [["a"]])[0], -torch.ones(3, 1))


def test_gradients_of_repeated_keys_are_summed() -> None:
    keyed = example(requires_grad=True)
    first, second = KeyedTensor.regroup([keyed], [["a", "b"], ["b"]])
    (first.sum() + 10 * second.sum()).backward()
    assert keyed.values().grad[0].tolist() == [1, 11, 11, 0, 0, 0]


def test_regroup_names_its_results() -> None:
    named = KeyedTensor.regroup_as_dict([example()], [["a"], ["c", "b"]], ["x", "y"])
    assert {key: tensor.shape[1] for key, tensor in named.items()} == {"x": 1, "y": 5}
    with pytest.raises(ValueError, match="1 groups but 2 keys"):
        KeyedTensor.regroup_as_dict([example()], [["a"]], ["x", "y"])


def test_regroup_names_an_unknown_key() -> None:
    with pytest.raises(KeyError, match=r"no tensor has the key 'x'; they have \['a', 'b', 'c'\]"):
        KeyedTensor.regroup([example()], [["a", "x"]])


def test_regroup_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one key_dim, got \[\]"):
        KeyedTensor.regroup([], [["a"]])


def test_moved_and_pickled_tensors_keep_their_keys() -> None:
    assert example().to("meta")["b"].device.type == "meta"
    assert torch.equal(pickle.loads(pickle.dumps(example()))["c"], example()["c"])


def test_repr_shows_widths() -> None:
    assert repr(example()) == "KeyedTensor({a: 1, b: 2, c: 3}, (3, 6) float32, cpu)"
