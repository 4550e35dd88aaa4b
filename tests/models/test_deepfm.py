"""SimpleDeepFMNN: values, options, training, tracing, errors."""

import numpy as np
import pytest
import torch

from shardwise.data import Batch
from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRMTrain, FMInteractionArch, SimpleDeepFMNN
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

KEYS = ["user", "movie"]


def small_model(**options) -> SimpleDeepFMNN:
    configs = [EmbeddingBagConfig(10, 4, key, feature_names=[key]) for key in KEYS]
    return SimpleDeepFMNN(5, EmbeddingBagCollection(configs), 6, 7, **options)


def bags(num_samples: int) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(KEYS) * num_samples,))
    return KeyedJaggedTensor(KEYS, torch.randint(10, (int(lengths.sum()),)), lengths=lengths)


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_interaction_equals_numpy(per_dimension, num_samples):
    arch = FMInteractionArch(12, KEYS, 7, per_dimension=per_dimension).double()
    dense, sparse = np.random.randn(num_samples, 4), np.random.randn(num_samples, 2, 4)
    x = np.concatenate([dense[:, None], sparse], 1)
    flat = x.reshape(num_samples, 12)
    weight, bias = (p.detach().numpy() for p in arch.parameters())
    terms = x if per_dimension else flat[:, :, None]
    pairs = ((terms.sum(1) ** 2 - (terms**2).sum(1)) / 2).sum(1, keepdims=True)
    expected = np.concatenate([dense, np.maximum(flat @ weight.T + bias, 0), pairs], 1)
    actual = arch(torch.from_numpy(dense), torch.from_numpy(sparse)).detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-10)


def test_model_is_its_parts_in_turn():
    model, dense, features = small_model(), torch.randn(6, 5), bags(6)
    vectors = model.dense_arch(dense), model.sparse_arch(features)
    last = model.over_arch.model[0]
    actual = model(dense, features)
    assert torch.equal(actual, torch.sigmoid(last(model.inter_arch(*vectors))))
    assert actual.shape == (6, 1)


def test_dense_arch_equals_numpy():
    arch = small_model().dense_arch.double()
    x = np.random.randn(6, 5)
    first, first_bias, last, last_bias = (p.detach().numpy() for p in arch.parameters())
    expected = np.maximum(np.maximum(x @ first.T + first_bias, 0) @ last.T + last_bias, 0)
    np.testing.assert_allclose(arch(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12)


def test_logits_are_what_the_sigmoid_is_taken_of():
    model, dense, features = small_model(), torch.randn(6, 5), bags(6)
    other = small_model(gives_logits=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(dense, features), other(dense, features).sigmoid())


def test_parameters_have_the_names_of_the_field():
    shapes = {n: list(p.shape) for n, p in small_model().state_dict().items()}
    assert shapes == {
        **{
            f"sparse_arch.embedding_bag_collection.embedding_bags.{k}.weight": [10, 4] for k in KEYS
        },
        "dense_arch.model.0.weight": [6, 5],
        "dense_arch.model.0.bias": [6],
        "dense_arch.model.2.weight": [4, 6],
        "dense_arch.model.2.bias": [4],
        "inter_arch.deep_fm.dense_module.0.weight": [7, 12],
        "inter_arch.deep_fm.dense_module.0.bias": [7],
        "over_arch.model.0.weight": [1, 12],
        "over_arch.model.0.bias": [1],
    }


def test_dense_device_is_that_of_all_but_the_tables():
    parameters = small_model(dense_device="meta").named_parameters()
    devices = {name.split(".")[0]: p.device.type for name, p in parameters}
    wanted = {"dense_arch": "meta", "inter_arch": "meta", "over_arch": "meta"}
    assert devices == {"sparse_arch": "cpu", **wanted}


@pytest.mark.parametrize("per_dimension", [False, True])
def test_every_part_learns(per_dimension):
    model = small_model(gives_logits=True, per_dimension=per_dimension)
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = torch.optim.Adam([p for n, p in model.named_parameters() if "sparse" not in n], 0.02)
    batch = Batch(torch.randn(64, 5), bags(64), torch.randint(2, (64,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(30):
        dense.zero_grad()
        loss, _ = DLRMTrain(model)(batch)
        loss.backward()
        dense.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_training_equals_eager():
    model, dense, features = small_model(), torch.randn(6, 5), bags(6)
    model(dense, features).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(dense, features).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


# ---- refused


def test_wrong_number_of_dense_features_is_named():
    with pytest.raises(ValueError, match="dense_features have 3 columns, the model was made for 5"):
        small_model()(torch.randn(6, 3), bags(6))


@pytest.mark.usefixtures("no_shape_checks")
def test_dense_and_sparse_must_be_of_the_same_samples():
    with pytest.raises(ValueError, match="dense_features have 5 samples, sparse_features 6"):
        small_model()(torch.randn(5, 5), bags(6))


@pytest.mark.usefixtures("no_shape_checks")
def test_interaction_names_the_vectors_it_wants():
    message = "FMInteractionArch: got 3 sparse vectors of width 4, wants 2 of the dense one's, 4"
    with pytest.raises(ValueError, match=message):
        FMInteractionArch(12, KEYS, 7)(torch.randn(5, 4), torch.randn(5, 3, 4))


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 6, 7), "num_dense"), ((5, 0, 7), "hidden"), ((5, 6, 0), "deep_fm")]
)
def test_sizes_must_be_positive(sizes, name):
    collection = EmbeddingBagCollection([EmbeddingBagConfig(10, 4, "user")])
    with pytest.raises(ValueError, match=rf"SimpleDeepFMNN: {name}\w+ must be at least 1, got 0"):
        SimpleDeepFMNN(sizes[0], collection, sizes[1], sizes[2])
