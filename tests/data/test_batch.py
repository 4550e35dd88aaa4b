import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from shardwise.data import Batch
from shardwise.jagged import KeyedJaggedTensor, Pipelineable


def batch(dense=((0.0, 1.0), (2.0, 3.0)), lengths=(1, 2, 0, 1), labels=(0.0, 1.0)) -> Batch:
    sparse = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.tensor(lengths))
    return Batch(torch.tensor(dense), sparse, torch.tensor(labels))


def test_fields_keep_their_order():
    first = batch()
    assert isinstance(first, Pipelineable)
    assert first.dense_features.tolist() == [[0, 1], [2, 3]]
    assert first.sparse_features.keys() == ["a", "b"]
    assert first.labels.tolist() == [0, 1]


def test_to_moves_every_part():
    moved = batch().to(torch.device("meta"), non_blocking=True)
    assert moved.dense_features.is_meta
    assert moved.sparse_features.values().is_meta
    assert moved.labels.is_meta


def test_batch_is_a_pytree_of_its_tensors():
    doubled = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * 2, batch())
    assert isinstance(doubled, Batch)
    assert doubled.dense_features.tolist() == [[0, 2], [4, 6]]
    assert doubled.sparse_features.values().tolist() == [0, 2, 4, 6]
    assert doubled.labels.tolist() == [0, 2]


def test_tree_map_may_put_anything_in_a_batch():
    types = pytree.tree_map(type, batch())
    assert (types.dense_features, types.labels) == (torch.Tensor, torch.Tensor)


def test_batch_survives_pickling():
    copy = pickle.loads(pickle.dumps(batch()))
    assert copy.dense_features.tolist() == [[0, 1], [2, 3]]
    assert copy.sparse_features.lengths().tolist() == [1, 2, 0, 1]


def test_whole_batch_is_valid():
    assert batch().validate(["x", "y"]) is None
    assert batch(labels=((0.0, 1.0), (1.0, 1.0))).validate() is None


NAN, INF = float("nan"), float("inf")
FAULTS = {
    "nan": (
        {"dense": ((0.0, 1.0), (NAN, 3.0))},
        r"dense_features, sample 1, column 0 \('x'\) is nan; every number must be finite",
    ),
    "inf": ({"dense": ((0.0, -INF), (2.0, 3.0))}, r"sample 0, column 1 \('y'\) is -inf"),
    "label": ({"labels": (0.0, NAN)}, "Batch: labels, sample 1 is nan"),
    "task": ({"labels": ((0.0, 1.0), (0.0, INF))}, "Batch: labels, sample 1, column 1 is inf"),
    "few labels": (
        {"labels": (0.0,)},
        "dense_features have 2 samples, sparse_features 2 and labels 1; all must have the same",
    ),
    "few rows": ({"dense": ((0.0, 1.0),)}, "dense_features have 1 samples, sparse_features 2"),
    "few bags": ({"lengths": (1, 3)}, "sparse_features 1 and labels 2"),
    "bags": ({"lengths": (1, 2, 0, 2)}, "lengths"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_names_what_and_where(fault):
    change, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        batch(**change).validate(["x", "y"])


@pytest.mark.gpu
def test_pinned_batch_is_copied_in_the_background():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pinned = batch().pin_memory()
    moved = pinned.to("cuda", non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert pinned.labels.is_pinned()
    assert moved.sparse_features.values().tolist() == [0, 1, 2, 3]
