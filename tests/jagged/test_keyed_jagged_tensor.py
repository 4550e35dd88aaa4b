import copy
import pickle

import pytest
import torch

from shardwise.jagged import (
    ComputeJTDictToKJT,
    ComputeKJTToJTDict,
    JaggedTensor,
    KeyedJaggedTensor,
    Pipelineable,
    flatten_kjt_list,
    kjt_is_equal,
    maybe_td_to_kjt,
    unflatten_kjt_list,
)


def example(is_weighted: bool = True, **changes) -> KeyedJaggedTensor:
    """a: [0], [1, 2]; b: [], [3, 4, 5]; c: [6], []."""
    values = torch.arange(7)
    lengths = torch.tensor([1, 2, 0, 3, 1, 0], dtype=torch.int32)
    weights = values / 10 if is_weighted else None
    return KeyedJaggedTensor(["a", "b", "c"], values, weights, lengths, **changes)


def bags(kjt: KeyedJaggedTensor, key: str) -> list[list[int]]:
    return [bag.tolist() for bag in kjt[key].to_dense()]


def test_layout_is_derived_from_lengths() -> None:
    kjt = example()
    assert kjt.stride() == 2
    assert kjt.stride_per_key() == [2, 2, 2]
    assert kjt.offsets().tolist() == [0, 1, 3, 3, 6, 7, 7]
    assert kjt.offsets().dtype == kjt.lengths().dtype
    assert kjt.length_per_key() == [3, 3, 1]
    assert kjt.offset_per_key() == [0, 3, 6, 7]
    assert kjt.lengths_offset_per_key() == [0, 2, 4, 6]
    assert kjt.index_per_key() == {"a": 0, "b": 1, "c": 2}
    assert not kjt.variable_stride_per_key()
    assert kjt.stride_per_key_per_rank() == []


def test_layout_is_the_same_from_offsets() -> None:
    kjt = KeyedJaggedTensor(["a", "b"], torch.arange(4), offsets=torch.tensor([0, 1, 1, 3, 4]))
    assert kjt.stride() == 2
    assert kjt.lengths().tolist() == [1, 0, 2, 1]
    assert kjt.length_per_key() == [1, 3]


def test_construction_computes_nothing() -> None:
    kjt = example()
    assert kjt.offsets_or_none() is None
    assert kjt.length_per_key_or_none() is None
    assert kjt.offset_per_key_or_none() is None


def test_sync_computes_and_unsync_forgets() -> None:
    kjt = example().sync()
    assert kjt.length_per_key_or_none() == [3, 3, 1]
    assert kjt.offset_per_key_or_none() == [0, 3, 6, 7]
    assert kjt.unsync().length_per_key_or_none() is None
    assert kjt.offset_per_key_or_none() is None


@pytest.mark.parametrize("by", ["lengths", "offsets"])
def test_sync_constructors_give_the_same(by: str) -> None:
    kjt = example()
    build = getattr(KeyedJaggedTensor, f"from_{by}_sync")
    made = build(kjt.keys(), kjt.values(), getattr(kjt, by)(), kjt.weights())
    assert made.length_per_key_or_none() == [3, 3, 1]
    assert kjt_is_equal(made, kjt)


def test_two_dimensional_lengths_are_flattened() -> None:
    kjt = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.tensor([[1, 1], [2, 0]]))
    assert kjt.stride() == 2
    assert kjt.flatten_lengths().lengths().shape == (4,)
    assert bags(kjt, "b") == [[2, 3], []]


def test_getitem_gives_views_with_offsets_from_zero() -> None:
    kjt = example()
    jagged = kjt["b"]
    assert jagged.values().tolist() == [3, 4, 5]
    assert jagged.offsets().tolist() == [0, 0, 3]
    assert jagged.values().data_ptr() == kjt.values()[3:].data_ptr()
    torch.testing.assert_close(jagged.weights(), torch.tensor([0.3, 0.4, 0.5]))


def test_unknown_key_is_named_beside_the_known() -> None:
    with pytest.raises(KeyError, match=r"no key 'd'; it has \['a', 'b', 'c'\]"):
        example()["d"]


def test_to_dict_is_kept() -> None:
    kjt = example()
    assert kjt.to_dict() is kjt.to_dict()
    assert kjt["a"] is kjt.to_dict()["a"]


def test_moving_drops_the_kept_views() -> None:
    kjt = example().sync()
    kjt.to_dict()
    moved = kjt.to(torch.device("meta"))
    assert moved["a"].device().type == "meta"
    assert moved.offset_per_key_or_none() == [0, 3, 6, 7]


def test_dtype_of_to_is_for_weights_alone() -> None:
    moved = example().to("cpu", dtype=torch.float64)
    assert moved.weights().dtype == torch.float64
    assert moved.values().dtype == torch.int64


def test_split_gives_views_and_allows_empty_segments() -> None:
    kjt = example()
    first, empty, rest = kjt.split([1, 0, 2])
    assert (first.keys(), empty.keys(), rest.keys()) == (["a"], [], ["b", "c"])
    assert empty.stride() == 2
    assert rest.values().data_ptr() == kjt.values()[3:].data_ptr()
    assert rest.weights().data_ptr() == kjt.weights()[3:].data_ptr()
    assert rest.lengths().data_ptr() == kjt.lengths()[2:].data_ptr()
    assert bags(rest, "c") == [[6], []]


def test_split_must_cover_all_keys() -> None:
    with pytest.raises(ValueError, match=r"segments \[1, 1\] must add up to the 3 keys"):
        example().split([1, 1])


@pytest.mark.parametrize("indices", [[2, 0, 1], [1], [0, 2, 0], []], ids=str)
@pytest.mark.parametrize("is_synced", [True, False])
def test_permute_moves_repeats_and_drops(indices: list[int], is_synced: bool) -> None:
    kjt = example()
    permuted = (kjt.sync() if is_synced else kjt).permute(indices)
    expected = [kjt[kjt.keys()[i]] for i in indices]
    assert permuted.keys() == [kjt.keys()[i] for i in indices]
    assert permuted.stride() == 2
    none = torch.empty(0)
    assert torch.equal(permuted.values(), torch.cat([e.values() for e in expected] or [none]))
    assert torch.equal(permuted.weights(), torch.cat([e.weights() for e in expected] or [none]))
    assert torch.equal(permuted.lengths(), torch.cat([e.lengths() for e in expected] or [none]))
    assert permuted.length_per_key() == [e.values().numel() for e in expected]


def test_permute_takes_the_indices_as_a_tensor_too() -> None:
    assert example().permute([1, 0, 2], torch.tensor([1, 0, 2])).keys() == ["b", "a", "c"]


def test_permute_carries_gradients_of_weights() -> None:
    weights = torch.zeros(7, requires_grad=True)
    kjt = example()
    kjt = KeyedJaggedTensor(kjt.keys(), kjt.values(), weights, kjt.lengths())
    kjt.permute([1, 1, 2]).weights().sum().backward()
    assert weights.grad.tolist() == [0, 0, 0, 2, 2, 2, 1]


@pytest.mark.parametrize("index", [3, -1])
def test_permute_names_an_unknown_place(index: int) -> None:
    with pytest.raises(IndexError, match=rf"{index} is not a place of one of the 3 keys"):
        example().permute([0, index])


def test_concat_undoes_split() -> None:
    kjt = example()
    assert kjt_is_equal(KeyedJaggedTensor.concat(kjt.split([1, 0, 2])), kjt)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "needs at least one"),
        ([example(is_weighted=False)], "all or none must have them"),
        ([KeyedJaggedTensor(["d"], torch.empty(0), torch.empty(0), torch.zeros(3).int())],
         r"one batch size, got \[2, 3\]"),
        ([example(stride_per_key_per_rank=[[2]] * 3)], "variable strides"),
    ],
)  # fmt: skip
def test_concat_refuses_what_does_not_fit(others: list[KeyedJaggedTensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyedJaggedTensor.concat([example(), *others] if others else [])


def test_jagged_tensors_by_key_round_trip() -> None:
    kjt = example()
    assert kjt_is_equal(KeyedJaggedTensor.from_jt_dict(kjt.to_dict()), kjt)
    assert kjt_is_equal(ComputeJTDictToKJT()(ComputeKJTToJTDict()(kjt)), kjt)


def test_empty_has_no_keys() -> None:
    kjt = KeyedJaggedTensor.empty(is_weighted=True, values_dtype=torch.int64)
    assert (kjt.keys(), kjt.stride(), kjt.length_per_key(), kjt.to_dict()) == ([], 0, [], {})
    assert kjt.offsets().tolist() == [0]
    assert kjt.split([]) == []


def test_empty_like_keeps_dtypes_and_batch() -> None:
    kjt = KeyedJaggedTensor.empty_like(example())
    assert (kjt.keys(), kjt.stride()) == ([], 2)
    assert (kjt.lengths().dtype, kjt.weights().dtype) == (torch.int32, torch.float32)


def test_empty_batch_keeps_its_keys() -> None:
    kjt = KeyedJaggedTensor(["a", "b"], torch.empty(0).long(), lengths=torch.empty(0).int())
    assert kjt.stride() == 0
    assert kjt.length_per_key() == [0, 0]
    assert kjt.permute([1, 0]).keys() == ["b", "a"]
    assert kjt["a"].to_dense() == []


def test_copy_forgets_the_counts_of_before() -> None:
    target, source = example().sync(), example()
    source.lengths().copy_(torch.tensor([0, 1, 2, 3, 0, 1]))
    target.to_dict()
    assert bags(target.copy_(source), "b") == [[1, 2], [3, 4, 5]]


def test_copy_renews_offsets_computed_before() -> None:
    target, source = example(), example()
    source.lengths().copy_(torch.tensor([0, 1, 2, 3, 0, 1]))
    target.offsets()
    assert target.copy_(source).offsets().tolist() == [0, 0, 1, 3, 6, 6, 7]


def test_copy_between_other_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"copy_: keys \['a', 'b', 'c'\] here, \['b', 'a', 'c'\]"):
        example().copy_(example().permute([1, 0, 2]))


def test_size_in_bytes_counts_inverse_indices() -> None:
    inverse = (["a", "b", "c"], torch.zeros(3, 5, dtype=torch.int64))
    added = example(inverse_indices=inverse).size_in_bytes() - example().size_in_bytes()
    assert added == 3 * 5 * 8


def test_missing_weights_and_inverse_indices_are_named() -> None:
    with pytest.raises(ValueError, match="it has no weights"):
        example(is_weighted=False).weights()
    with pytest.raises(ValueError, match=r"keys \['a', 'b', 'c'\]: it has no inverse indices"):
        example().inverse_indices()


@pytest.mark.parametrize(
    "duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_pickled_and_copied_tensors_are_equal(duplicate) -> None:
    kjt = example().sync()
    made = duplicate(kjt)
    assert kjt_is_equal(made, kjt)
    assert made.length_per_key_or_none() == [3, 3, 1]


def test_equality_ignores_the_order_of_keys() -> None:
    kjt = example()
    assert kjt_is_equal(kjt, kjt.permute([2, 0, 1]))
    assert not kjt_is_equal(kjt, kjt.permute([0, 1]))
    assert not kjt_is_equal(kjt, example(is_weighted=False))


def test_lists_are_flattened_and_restored() -> None:
    kjts = [example(), example(is_weighted=False).permute([1, 0])]
    leaves, contexts = flatten_kjt_list(kjts)
    restored = unflatten_kjt_list(leaves, contexts)
    assert all(kjt_is_equal(a, b) for a, b in zip(kjts, restored, strict=True))
    with pytest.raises(ValueError, match="2 contexts need 6 leaves each, got 11"):
        unflatten_kjt_list(leaves[:-1], contexts)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_by_key_become_keyed() -> None:
    bags_of_a = [torch.tensor([0]), torch.tensor([1, 2])]
    nested = torch.nested.nested_tensor(bags_of_a, layout=torch.jagged)
    kjt = maybe_td_to_kjt({"a": nested, "b": nested}, keys=["b"])
    assert kjt.keys() == ["b"]
    assert bags(kjt, "b") == [[0], [1, 2]]
    assert maybe_td_to_kjt(kjt) is kjt


def test_it_can_be_pipelined() -> None:
    assert isinstance(example(), Pipelineable)
    assert isinstance(JaggedTensor.empty(), Pipelineable)


def test_repr_shows_the_first_bags_of_each_key() -> None:
    assert repr(example(is_weighted=False)).splitlines() == [
        "KeyedJaggedTensor(3 keys, 2 samples, 7 values int64, cpu)",
        "  a: [[0], [1, 2]]",
        "  b: [[], [3, 4, 5]]",
        "  c: [[6], []]",
    ]
