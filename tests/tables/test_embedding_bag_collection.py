"""Pooled collections: names, values, gradients, variable batches, bad input."""

import copy

import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import Adagrad, RowWiseAdagrad, in_backward
from shardwise.tables import (
    BadIds,
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    PoolingType,
)


def config(name, rows=10, width=4, features=(), **options) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(rows, width, name, feature_names=list(features), **options)


def kjt(lengths: dict, rows=10, weights=None) -> KeyedJaggedTensor:
    counts = torch.tensor([length for row in lengths.values() for length in row])
    ids = torch.arange(int(counts.sum())) * 7 % rows
    return KeyedJaggedTensor(list(lengths), ids, weights=weights, lengths=counts)


def test_output_columns_follow_tables_then_features():
    tables = [config("a", features=["f", "g"]), config("b", 10, 8, ["f"]), config("c", 10, 2)]
    out = EmbeddingBagCollection(tables)(kjt({"f": [1, 2], "g": [0, 1], "c": [1, 1]}))
    assert out.keys() == ["f@a", "g", "f@b", "c"]
    assert out.length_per_key() == [4, 4, 8, 2]
    assert out.values().shape == (2, 18)


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_values_and_gradients_equal_embedding_bag(pooling):
    collection = EmbeddingBagCollection(
        [config("a", features=["f"], pooling=pooling), config("b", 10, 8, ["f", "g"])]
    )
    features = kjt({"g": [2, 0, 1], "f": [3, 1, 0]})
    out = collection(features)
    modes = {"f@a": pooling.value.lower(), "f@b": "sum", "g": "sum"}
    wanted = [
        torch.nn.functional.embedding_bag(
            features[key.partition("@")[0]].values(),
            collection.embedding_bags[table].weight,
            features[key.partition("@")[0]].offsets().long(),
            mode=modes[key],
            include_last_offset=True,
        )
        for key, table in [("f@a", "a"), ("f@b", "b"), ("g", "b")]
    ]
    torch.testing.assert_close(out.values(), torch.cat(wanted, 1))
    grad = torch.randn_like(out.values())
    parameters = list(collection.parameters())
    actual = torch.autograd.grad(out.values(), parameters, grad)
    expected = torch.autograd.grad(torch.cat(wanted, 1), parameters, grad)
    torch.testing.assert_close(actual, expected)


def test_gradients_are_row_sparse_when_asked_for():
    torch.manual_seed(0)
    dense = EmbeddingBagCollection([config("f")])
    sparse = EmbeddingBagCollection([config("f")], sparse=True)
    for collection in (dense, sparse):
        collection(kjt({"f": [1, 2]})).values().sum().backward()
    grad = sparse.embedding_bags["f"].weight.grad
    assert grad.is_sparse
    assert torch.equal(grad.to_dense(), dense.embedding_bags["f"].weight.grad)


def test_values_need_not_be_contiguous():
    collection = EmbeddingBagCollection([config("f")])
    ids = torch.tensor([[1, 9], [2, 9], [3, 9]])[:, 0]
    out = collection(KeyedJaggedTensor(["f"], ids, lengths=torch.tensor([1, 2])))
    rows = collection.embedding_bags["f"].weight
    torch.testing.assert_close(out["f"], torch.stack([rows[1], rows[2] + rows[3]]))


def test_parameters_are_named_by_table():
    collection = EmbeddingBagCollection([config("a"), config("b")])
    names = ["embedding_bags.a.weight", "embedding_bags.b.weight"]
    assert list(collection.state_dict()) == names


def test_weighted_mean_divides_by_the_count():
    collection = EmbeddingBagCollection([config("f", pooling=PoolingType.MEAN)], is_weighted=True)
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    out = collection(kjt({"f": [2]}, weights=weights)).values()
    rows = collection.embedding_bags["f"].weight
    torch.testing.assert_close(out[0], (0.5 * rows[0] + 2 * rows[7]) / 2)
    out.sum().backward()
    torch.testing.assert_close(weights.grad, rows[[0, 7]].sum(1).detach() / 2)


@pytest.mark.parametrize("data_type", DataType)
def test_rows_keep_their_format_and_results_are_float32(data_type):
    collection = EmbeddingBagCollection([config("f", data_type=data_type)])
    assert collection.embedding_bags["f"].weight.dtype == data_type.dtype
    out = collection(kjt({"f": [2, 1]})).values()
    assert out.dtype == torch.float32
    rows = collection.embedding_bags["f"].weight.float()
    torch.testing.assert_close(out, torch.stack([rows[0] + rows[7], rows[4]]))


def test_variable_batch_is_expanded_by_inverse_indices():
    collection = EmbeddingBagCollection([config("a", features=["f"]), config("b", 10, 8, ["g"])])
    features = KeyedJaggedTensor(
        ["f", "g"],
        torch.tensor([1, 2, 3, 4, 5]),
        lengths=torch.tensor([1, 1, 1, 0, 2]),
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["g", "f"], torch.tensor([[0, 1, 2, 2], [1, 0, 1, 1]])),
    )
    out = collection(features)
    a, b = collection.embedding_bags["a"].weight, collection.embedding_bags["b"].weight
    torch.testing.assert_close(out["f"], a[[2, 1, 2, 2]])
    both = b[4] + b[5]
    torch.testing.assert_close(out["g"], torch.stack([b[3], torch.zeros(8), both, both]))


def test_variable_batch_without_inverse_indices_is_an_error():
    collection = EmbeddingBagCollection([config("f"), config("g")])
    features = KeyedJaggedTensor(
        ["f", "g"],
        torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
    )
    with pytest.raises(ValueError, match=r"feature 'g' has 1 samples, others 2.*inverse_indices"):
        collection(features)


# ---- the start of tables


def test_start_is_uniform_in_the_configured_range():
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(
        [config("a", 100, 64), config("b", 100, 64, weight_init_min=1.0, weight_init_max=2.0)]
    )
    a, b = (store.weight for store in collection.embedding_bags.values())
    assert -0.1 <= a.min() < -0.09 < 0.09 < a.max() <= 0.1
    assert 1.0 <= b.min() < 1.01 < 1.99 < b.max() <= 2.0


def test_init_function_fills_the_table():
    table = config("a", 70_000, 2, init_fn=lambda rows: rows.normal_(5.0))
    weight = EmbeddingBagCollection([table]).embedding_bags["a"].weight
    assert weight.mean().item() == pytest.approx(5.0, abs=0.02)
    assert not torch.equal(weight[0], weight[65_536])


def test_start_follows_the_default_generator():
    starts = []
    for _ in range(2):
        torch.manual_seed(3)
        first, second = (EmbeddingBagCollection([config("a")]) for _ in range(2))
        starts.append(first.embedding_bags["a"].weight)
        assert not torch.equal(first.embedding_bags["a"].weight, second.embedding_bags["a"].weight)
    assert torch.equal(*starts)


def test_meta_tables_take_no_memory_and_materialise():
    collection = EmbeddingBagCollection([config("a", 10**12)], device="meta")
    assert collection.embedding_bags["a"].weight.is_meta
    small = EmbeddingBagCollection([config("a")], device="meta").to_empty(device="cpu")
    small.reset_parameters()
    assert small.embedding_bags["a"].weight.abs().max() <= 10**-0.5


# ---- bad input


def collection_of_two(**options) -> EmbeddingBagCollection:
    return EmbeddingBagCollection([config("a", features=["f"]), config("b", features=["g"])],
                                  **options)  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [(["f"], r"missing \['g'\]"), (["f", "g", "x"], r"unknown \['x'\]")],
)
def test_missing_and_unknown_keys_are_named(keys, message):
    features = kjt({key: [1, 1] for key in keys})
    with pytest.raises(KeyError, match=message):
        collection_of_two()(features)


def test_bad_id_names_feature_sample_id_and_table_and_changes_nothing():
    collection = collection_of_two()
    optimizer = in_backward(collection, RowWiseAdagrad, lr=0.1)
    before = copy.deepcopy(collection.state_dict())
    features = KeyedJaggedTensor(
        ["f", "g"], torch.tensor([1, 2, 3, 99]), lengths=torch.tensor([1, 1, 1, 1])
    )
    with pytest.raises(IndexError, match=r"feature 'g', sample 1: id 99 .* table 'b'.* 0 to 9"):
        collection(features).values().sum().backward()
    for name, value in collection.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(s["step"] == 0 for s in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1, -1, 1, 1], "-1"), ([1, 1, 1, 2], "5"), ([0, 1, 1, 1], "3")],
)
def test_bad_lengths_are_an_error(lengths, message):
    features = KeyedJaggedTensor(["f", "g"], torch.arange(4), lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match=message):
        collection_of_two()(features)


def test_weighted_collection_wants_weights():
    with pytest.raises(ValueError, match="no weights"):
        collection_of_two(is_weighted=True)(kjt({"f": [1], "g": [1]}))


def test_ignored_ids_are_counted_by_output():
    collection = collection_of_two(bad_ids=BadIds.IGNORE)
    collection(KeyedJaggedTensor(["f", "g"], torch.tensor([1, 77]), lengths=torch.tensor([1, 1])))
    assert collection.num_ignored_ids == {"f": 0, "g": 1}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([config("a"), config("a")], r"several named \['a'\]"),
        ([config("a", features=["f", "f"])], "table 'a': feature_names has a repeat"),
        ([config("a", rows=0)], "table 'a'.*num_embeddings 0"),
        ([config("")], "needs a name"),
        ([config("a", use_virtual_table=True)], "table 'a': use_virtual_table"),
        ([config("a", need_pos=True)], "table 'a': need_pos"),
        ([config("a", pooling=PoolingType.NONE)], "EmbeddingCollection"),
        ([config("a", weight_init_min=2.0, weight_init_max=1.0)], "weight_init_min 2.0"),
    ],
)
def test_impossible_tables_are_refused_by_name(tables, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingBagCollection(tables)


# ---- rules on a plain collection


def test_a_table_has_one_rule():
    collection = collection_of_two()
    in_backward(collection, RowWiseAdagrad, lr=0.1)
    with pytest.raises(ValueError, match="table 'a' has an update rule already"):
        in_backward(collection, Adagrad, lr=0.1)


def test_collection_survives_deepcopy_with_its_rule():
    collection = collection_of_two()
    in_backward(collection, RowWiseAdagrad, lr=0.1)
    twin = copy.deepcopy(collection)
    features = kjt({"f": [1, 2], "g": [1, 1]})
    for module in (collection, twin):
        module(features).values().sum().backward()
    for a, b in zip(collection.parameters(), twin.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_load_state_dict_by_assignment_is_seen_by_the_lookup():
    collection, other = collection_of_two(), collection_of_two()
    collection.load_state_dict(other.state_dict(), assign=True)
    features = kjt({"f": [1, 2], "g": [1, 1]})
    assert torch.equal(collection(features).values(), other(features).values())
