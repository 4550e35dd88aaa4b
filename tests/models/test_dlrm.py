"""DLRM: every part equals NumPy, the whole trains as one of PyTorch's own parts, errors."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.data import Batch
from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRM, DenseArch, DLRMTrain, InteractionArch, OverArch, SparseArch
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

KEYS = ["user", "movie", "genres"]


def tables(*widths: int) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(10, width, name, feature_names=[name])
            for name, width in zip(KEYS, widths, strict=False)
        ]
    )


def bags(num_samples: int) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(KEYS) * num_samples,))
    return KeyedJaggedTensor(KEYS, torch.randint(10, (int(lengths.sum()),)), lengths=lengths)


def batch(num_samples: int, dtype=torch.int64) -> Batch:
    labels = torch.randint(2, (num_samples,)).to(dtype)
    return Batch(torch.randn(num_samples, 5), bags(num_samples), labels)


def small_dlrm() -> DLRM:
    return DLRM(
        embedding_bag_collection=tables(4, 4, 4),
        dense_in_features=5,
        dense_arch_layer_sizes=[6, 4],
        over_arch_layer_sizes=[8, 1],
    )


# ---- parts


def test_sparse_arch_stacks_the_pooled_features():
    arch = SparseArch(tables(4, 4, 4))
    features = bags(6)
    assert arch.sparse_feature_names == KEYS
    expected = np.zeros((6, 3, 4))
    for column, key in enumerate(KEYS):
        rows = arch.embedding_bag_collection.embedding_bags[key].weight.detach().numpy()
        bag_of_sample = torch.split(features[key].values(), features[key].lengths().tolist())
        for sample, ids in enumerate(bag_of_sample):
            expected[sample, column] = rows[ids.numpy()].sum(0)
    np.testing.assert_allclose(arch(features).detach().numpy(), expected, atol=1e-6)


def test_shared_feature_is_named_by_its_table():
    configs = [
        EmbeddingBagConfig(10, 4, "a", feature_names=["f", "g"]),
        EmbeddingBagConfig(10, 4, "b", feature_names=["f"]),
    ]
    arch = SparseArch(EmbeddingBagCollection(configs))
    features = KeyedJaggedTensor(["f", "g"], torch.tensor([1, 2]), lengths=torch.tensor([1, 1]))
    pooled = arch.embedding_bag_collection(features)
    assert arch.sparse_feature_names == ["f@a", "g", "f@b"] == pooled.keys()
    torch.testing.assert_close(arch(features)[:, 2], pooled["f@b"])


def test_dense_arch_has_relu_on_every_layer():
    arch = DenseArch(5, [6, 4]).double()
    x = np.random.randn(7, 5)
    first, first_bias, last, last_bias = (p.detach().numpy() for p in arch.parameters())
    expected = np.maximum(np.maximum(x @ first.T + first_bias, 0) @ last.T + last_bias, 0)
    np.testing.assert_allclose(arch(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12)


def test_interaction_puts_the_dense_vector_before_the_pairs_row_by_row():
    dense = torch.tensor([[1.0, 0.0]])
    sparse = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    assert InteractionArch(3)(dense, sparse).tolist() == [[1, 0, 2, 0, 1, 0, 2, 3]]


@pytest.mark.parametrize("num_sparse", [1, 2, 26])
@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_interaction_equals_numpy(num_sparse, num_samples):
    dense, sparse = np.random.randn(num_samples, 8), np.random.randn(num_samples, num_sparse, 8)
    vectors = np.concatenate([dense[:, None], sparse], 1)
    products = np.einsum("bid,bjd->bij", vectors, vectors)
    upper = np.triu_indices(num_sparse + 1, 1)
    expected = np.concatenate([dense, products[:, upper[0], upper[1]]], 1)
    actual = InteractionArch(num_sparse)(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)
    assert actual.shape == (num_samples, 8 + num_sparse * (num_sparse + 1) // 2)


def test_interaction_gradients():
    dense = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    sparse = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(InteractionArch(4), (dense, sparse))


def test_interaction_without_sparse_vectors_is_the_dense_one():
    dense = torch.randn(5, 4)
    assert InteractionArch(0)(dense, torch.empty(5, 0, 4)) is dense


@pytest.mark.usefixtures("no_shape_checks")
def test_interaction_names_the_vectors_it_wants():
    message = "got 2 sparse vectors of width 4, wants 3 of the dense one's, 4"
    with pytest.raises(ValueError, match=message):
        InteractionArch(3)(torch.randn(5, 4), torch.randn(5, 2, 4))


def test_over_arch_has_relu_on_all_layers_but_the_last():
    arch = OverArch(5, [6, 2]).double()
    x = np.random.randn(7, 5)
    first, first_bias, last, last_bias = (p.detach().numpy() for p in arch.parameters())
    expected = np.maximum(x @ first.T + first_bias, 0) @ last.T + last_bias
    np.testing.assert_allclose(arch(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12)
    assert (expected < 0).any()


# ---- the whole


def test_dlrm_is_its_parts_in_turn():
    model, one = small_dlrm(), batch(6)
    dense, sparse = model.dense_arch(one.dense_features), model.sparse_arch(one.sparse_features)
    expected = model.over_arch(model.inter_arch(dense, sparse))
    actual = model(one.dense_features, one.sparse_features)
    assert torch.equal(actual, expected)
    assert actual.shape == (6, 1)


def test_parameters_have_the_names_of_the_field():
    assert list(small_dlrm().state_dict()) == [
        *(f"sparse_arch.embedding_bag_collection.embedding_bags.{key}.weight" for key in KEYS),
        "dense_arch.model._mlp.0._linear.weight",
        "dense_arch.model._mlp.0._linear.bias",
        "dense_arch.model._mlp.1._linear.weight",
        "dense_arch.model._mlp.1._linear.bias",
        "over_arch.model.0._mlp.0._linear.weight",
        "over_arch.model.0._mlp.0._linear.bias",
        "over_arch.model.1.weight",
        "over_arch.model.1.bias",
    ]


def test_dense_device_is_that_of_all_but_the_tables():
    model = DLRM(tables(4, 4, 4), 5, [4], [8, 1], dense_device="meta")
    devices = {name.split(".")[0]: p.device.type for name, p in model.named_parameters()}
    assert devices == {"sparse_arch": "cpu", "dense_arch": "meta", "over_arch": "meta"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_loss_is_the_mean_cross_entropy_of_the_labels(dtype):
    model, one = small_dlrm(), batch(6, dtype)
    loss, (detached, logits, labels) = DLRMTrain(model)(one)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = one.labels.double().numpy()
    assert loss.item() == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), abs=1e-6)
    assert torch.equal(logits, model(one.dense_features, one.sparse_features)[:, 0])
    assert torch.equal(labels, one.labels)
    assert loss.requires_grad
    assert not detached.requires_grad
    assert not logits.requires_grad


def test_several_logits_take_one_label_each():
    model = DLRM(tables(4, 4, 4), 5, [4], [8, 2])
    one = batch(6)
    one.labels = torch.randint(2, (6, 2))
    loss, (_, logits, _) = DLRMTrain(model)(one)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, one.labels.float())
    torch.testing.assert_close(loss, expected)


def test_one_sample_keeps_its_dimension():
    _, (_, logits, labels) = DLRMTrain(small_dlrm())(batch(1))
    assert logits.shape == labels.shape == (1,)


class PlainDLRM(nn.Module):
    """The same model with a `torch.nn.EmbeddingBag` for each table."""

    def __init__(self, like: DLRM) -> None:
        super().__init__()
        stores = like.sparse_arch.embedding_bag_collection.embedding_bags
        self.tables = nn.ModuleDict(
            {
                name: nn.EmbeddingBag.from_pretrained(
                    store.weight.detach().clone(),
                    freeze=False,
                    mode="sum",
                    include_last_offset=True,
                )
                for name, store in stores.items()
            }
        )
        self.dense, self.over = like.dense_arch, like.over_arch

    def forward(self, dense_features, features):
        vectors = [self.dense(dense_features)]
        for key in KEYS:
            vectors.append(self.tables[key](features[key].values(), features[key].offsets().long()))
        products = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
        return self.over(torch.cat([vectors[0], torch.stack(products, 1)], 1))


def test_fused_step_equals_embedding_bag_with_dense_row_wise_adagrad():
    ours, one = small_dlrm(), batch(32)
    plain = PlainDLRM(copy.deepcopy(ours))
    in_backward(ours, RowWiseAdagrad, lr=0.1, eps=1e-8)
    optimizer = RowWiseAdagrad(plain.tables.parameters(), lr=0.1, eps=1e-8)
    for each in (ours, plain):
        loss, _ = DLRMTrain(each)(one)
        loss.backward()
    optimizer.step()
    tables = ours.sparse_arch.embedding_bag_collection.embedding_bags
    for name, table in plain.tables.items():
        torch.testing.assert_close(tables[name].weight, table.weight, rtol=1e-6, atol=1e-6)
    for p, q in zip(ours.dense_arch.parameters(), plain.dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)


def test_every_part_learns():
    model = small_dlrm()
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = torch.optim.Adam([p for n, p in model.named_parameters() if "sparse" not in n], 0.02)
    one, train = batch(64), DLRMTrain(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(30):
        dense.zero_grad()
        loss, _ = train(one)
        loss.backward()
        dense.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- refused


def test_tables_of_two_widths_are_named():
    message = "table 'movie' has embedding_dim 8, table 'user' 4; all must have the same"
    with pytest.raises(ValueError, match=message):
        DLRM(tables(4, 8, 4), 5, [4], [8, 1])


def test_collection_without_tables_is_refused():
    with pytest.raises(ValueError, match="the collection has no tables"):
        SparseArch(tables())


@pytest.mark.parametrize("layer_sizes", [[6, 5], []])
def test_dense_layers_end_in_the_width_of_the_tables(layer_sizes):
    with pytest.raises(
        ValueError, match=r"dense_arch_layer_sizes \[.*\] must end in .* embedding_dim, 4"
    ):
        DLRM(tables(4, 4, 4), 5, layer_sizes, [8, 1])


def test_over_arch_needs_two_layers():
    with pytest.raises(ValueError, match=r"at least two widths, got \[1\]"):
        DLRM(tables(4, 4, 4), 5, [4], [1])


def test_wrong_number_of_dense_features_is_named():
    with pytest.raises(ValueError, match="the input has 3 columns, the layer was made for 5"):
        small_dlrm()(torch.randn(6, 3), bags(6))


@pytest.mark.usefixtures("no_shape_checks")
def test_dense_and_sparse_must_be_of_the_same_samples():
    with pytest.raises(ValueError, match="dense_features have 5 samples, sparse_features 6"):
        small_dlrm()(torch.randn(5, 5), bags(6))


def test_labels_of_another_shape_are_refused():
    one = batch(6)
    one.labels = one.labels[:, None]
    with pytest.raises(ValueError, match=r"labels have shape \[6, 1\], logits \[6\]"):
        DLRMTrain(small_dlrm())(one)


# ---- traced


@pytest.mark.usefixtures("no_shape_checks")
def test_dense_parts_compile_to_one_graph():
    model = small_dlrm()
    dense, sparse = torch.randn(6, 5), torch.randn(6, 3, 4, requires_grad=True)

    def score(dense, sparse):
        return model.over_arch(model.inter_arch(model.dense_arch(dense), sparse))

    expected = score(dense, sparse)
    actual = torch.compile(score, fullgraph=True, backend="aot_eager")(dense, sparse)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.sum(), sparse)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), sparse)[0])
