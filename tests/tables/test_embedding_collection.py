"""Per-id collections."""

import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingCollection, EmbeddingConfig

IDS = torch.tensor([1, 2, 3, 4, 5, 6])
LENGTHS = torch.tensor([2, 1, 0, 3])


def features(keys=("f", "g")) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(list(keys), IDS, lengths=LENGTHS)


def test_each_id_has_its_row():
    collection = EmbeddingCollection([EmbeddingConfig(10, 4, "f"), EmbeddingConfig(20, 4, "g")])
    out = collection(features())
    f, g = (store.weight for store in collection.embeddings.values())
    assert list(out) == ["f", "g"]
    assert torch.equal(out["f"].values(), f[[1, 2, 3]])
    assert torch.equal(out["g"].values(), g[[4, 5, 6]])
    assert out["g"].lengths().tolist() == [0, 3]


def test_feature_of_two_tables_has_two_outputs():
    tables = [
        EmbeddingConfig(10, 4, "a", feature_names=["f", "g"]),
        EmbeddingConfig(10, 4, "b", feature_names=["f"]),
    ]
    collection = EmbeddingCollection(tables)
    out = collection(features(["g", "f"]))
    a, b = (store.weight for store in collection.embeddings.values())
    assert list(out) == ["f@a", "g", "f@b"]
    assert torch.equal(out["f@a"].values(), a[[4, 5, 6]])
    assert torch.equal(out["g"].values(), a[[1, 2, 3]])
    assert torch.equal(out["f@b"].values(), b[[4, 5, 6]])


def test_gradients_of_a_repeated_id_add_up():
    collection = EmbeddingCollection([EmbeddingConfig(10, 4, "f")])
    ids = torch.tensor([3, 3, 1])
    out = collection(KeyedJaggedTensor(["f"], ids, lengths=torch.tensor([3])))
    out["f"].values().sum().backward()
    grad = collection.embeddings["f"].weight.grad
    assert grad[:, 0].tolist() == [0, 1, 0, 2, 0, 0, 0, 0, 0, 0]


def test_ids_come_with_the_vectors_when_asked_for():
    collection = EmbeddingCollection(
        [EmbeddingConfig(10, 4, "f"), EmbeddingConfig(10, 4, "g")], need_indices=True
    )
    assert collection(features())["g"].weights().tolist() == [4, 5, 6]


def test_widths_must_agree():
    with pytest.raises(ValueError, match=r"\{'f': 4, 'g': 8\}"):
        EmbeddingCollection([EmbeddingConfig(10, 4, "f"), EmbeddingConfig(10, 8, "g")])


def test_batches_may_vary_between_keys():
    collection = EmbeddingCollection([EmbeddingConfig(10, 4, "f"), EmbeddingConfig(10, 4, "g")])
    batch = KeyedJaggedTensor(
        ["f", "g"], IDS, lengths=torch.tensor([2, 1, 3]), stride_per_key_per_rank=[[1], [2]]
    )
    out = collection(batch)
    assert out["f"].lengths().tolist() == [2]
    assert out["g"].lengths().tolist() == [1, 3]
    assert torch.equal(out["g"].values(), collection.embeddings["g"].weight[[3, 4, 5, 6]])


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_equals_eager():
    tables = [EmbeddingConfig(10, 4, "a", feature_names=["f", "g"]), EmbeddingConfig(10, 4, "f")]
    trained = []
    for wrap in (lambda module: module, compiled):
        torch.manual_seed(0)
        collection = EmbeddingCollection(tables)
        in_backward(collection, RowWiseAdagrad, lr=0.1)
        step = wrap(collection)
        for keys in (["f", "g"], ["g", "f"]):
            sum((out.values() ** 2).sum() for out in step(features(keys)).values()).backward()
        trained.append(list(collection.parameters()))
    torch.testing.assert_close(*trained)


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")
