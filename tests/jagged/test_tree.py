import io

import pytest
import torch
import torch.utils._pytree as pytree

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor, jt_is_equal, kjt_is_equal


def keyed_jagged(**changes) -> KeyedJaggedTensor:
    lengths = torch.tensor([1, 2, 0, 1])
    return KeyedJaggedTensor(["a", "b"], torch.arange(4), torch.ones(4), lengths, **changes)


def variable() -> KeyedJaggedTensor:
    inverse = (["b", "a"], torch.zeros(2, 3, dtype=torch.int64))
    return keyed_jagged(stride_per_key_per_rank=[[1], [3]], inverse_indices=inverse)


def test_leaves_come_in_the_documented_order() -> None:
    kjt = variable()
    values, weights, lengths, offsets, strides, inverse = pytree.tree_leaves(kjt)
    assert values is kjt.values()
    assert weights is kjt.weights()
    assert lengths is kjt.lengths()
    assert offsets is None
    assert strides.tolist() == [[1], [3]]
    assert inverse is kjt.inverse_indices()[1]


def test_offsets_are_no_leaf_even_when_they_are_all_that_was_given() -> None:
    kjt = KeyedJaggedTensor(["a"], torch.arange(2), offsets=torch.tensor([0, 2]))
    leaves = pytree.tree_leaves(kjt)
    assert leaves[2].tolist() == [2]
    assert leaves[3] is None


@pytest.mark.parametrize("make", [keyed_jagged, variable])
def test_keyed_jagged_tensor_is_restored(make) -> None:
    leaves, spec = pytree.tree_flatten(make())
    restored = pytree.tree_unflatten(leaves, spec)
    restored.validate()
    assert kjt_is_equal(restored, make())
    assert restored.stride_per_key() == make().stride_per_key()
    assert (restored.inverse_indices_or_none() is None) == (make is keyed_jagged)


def test_jagged_tensor_is_restored() -> None:
    jagged = keyed_jagged()["a"]
    leaves, spec = pytree.tree_flatten(jagged)
    assert len(leaves) == 4
    assert jt_is_equal(pytree.tree_unflatten(leaves, spec), jagged)


def test_keyed_tensor_is_restored() -> None:
    keyed = KeyedTensor(["a", "b"], [1, 2], torch.ones(3, 4), key_dim=0)
    leaves, spec = pytree.tree_flatten(keyed)
    restored = pytree.tree_unflatten(leaves, spec)
    assert (restored.keys(), restored.length_per_key(), restored.key_dim()) == (
        ["a", "b"],
        [1, 2],
        0,
    )


@pytest.mark.parametrize(
    "value",
    [keyed_jagged(), variable(), keyed_jagged()["a"], KeyedTensor(["a"], [1], torch.ones(1, 1))],
)
def test_tree_specs_are_saved_and_loaded(value: object) -> None:
    spec = pytree.tree_structure(value)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_leaves_are_found_by_name() -> None:
    paths, _ = pytree.tree_flatten_with_path({"x": keyed_jagged()})
    names = [pytree.keystr(path) for path, leaf in paths if leaf is not None]
    assert names == ["['x'].values", "['x'].weights", "['x'].lengths"]


def test_trees_may_hold_other_things_than_tensors() -> None:
    for value in (variable(), keyed_jagged()["a"], KeyedTensor(["a"], [1], torch.ones(1, 1))):
        sizes = pytree.tree_map(lambda leaf: None if leaf is None else leaf.numel(), value)
        assert pytree.tree_structure(sizes) == pytree.tree_structure(value)
        assert pytree.tree_leaves(sizes)[0] == value.values().numel()


def test_saved_tensors_load_without_pickle_of_anything() -> None:
    file = io.BytesIO()
    torch.save([keyed_jagged(), keyed_jagged()["a"]], file)
    file.seek(0)
    kjt, jagged = torch.load(file, weights_only=True)
    assert kjt_is_equal(kjt, keyed_jagged())
    assert isinstance(jagged, JaggedTensor)
