"""DLRM's parts equal NumPy; the whole trains as one made of PyTorch's own parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRM, DLRMTrain, InteractionArch, OverArch, SparseArch
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

TABLES = [("a", 50, ["a"]), ("b", 60, ["b", "a"])]


def collection() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        [EmbeddingBagConfig(rows, 8, name, feature_names=list(f)) for name, rows, f in TABLES]
    )


def model(seed=0) -> DLRM:
    torch.manual_seed(seed)
    return DLRM(collection(), 5, [16, 8], [12, 1])


def batch(size: int, seed=0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (2 * size,), generator=generator)
    ids = torch.randint(0, 50, (int(lengths.sum()),), generator=generator)
    return SimpleNamespace(
        dense_features=torch.randn(size, 5, generator=generator),
        sparse_features=KeyedJaggedTensor(["a", "b"], ids, lengths=lengths),
        labels=torch.randint(0, 2, (size,), generator=generator),
    )


def test_sparse_arch_gives_features_in_output_order():
    arch = SparseArch(collection())
    assert arch.sparse_feature_names == ["a@a", "b", "a@b"]
    features = batch(4).sparse_features
    wanted = arch.embedding_bag_collection(features).to_dict()
    assert torch.equal(arch(features), torch.stack(list(wanted.values()), 1))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_interaction_lists_products_row_by_row(count):
    dense, sparse = torch.randn(6, 4), torch.randn(6, count, 4)
    x = np.concatenate([dense.double().numpy()[:, None], sparse.double().numpy()], 1)
    pairs = [(i, j) for i in range(count + 1) for j in range(i + 1, count + 1)]
    products = [np.einsum("bd,bd->b", x[:, i], x[:, j]) for i, j in pairs]
    wanted = np.concatenate([x[:, 0], *(p[:, None] for p in products)], 1)
    result = InteractionArch(count)(dense, sparse)
    np.testing.assert_allclose(result.double().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_cross_entropy_on_logits():
    example = batch(7)
    loss, (detached, logits, labels) = DLRMTrain(model())(example)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = example.labels.numpy()
    wanted = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert detached == loss
    assert not detached.requires_grad
    assert torch.equal(labels, example.labels)
    assert logits.shape == (7,)


class PlainDLRM(nn.Module):
    """The same model of `torch.nn.EmbeddingBag`s."""

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
        dense = self.dense(dense_features)
        vectors = [dense]
        for table, key in [("a", "a"), ("b", "b"), ("b", "a")]:
            bags = features[key]
            vectors.append(self.tables[table](bags.values(), bags.offsets().long()))
        products = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
        return self.over(torch.cat([dense, torch.stack(products, 1)], 1))


def test_fused_step_equals_embedding_bag_with_dense_row_wise_adagrad():
    ours, plain = model(), PlainDLRM(model())
    in_backward(ours, RowWiseAdagrad, lr=0.1, eps=1e-8)
    optimizer = RowWiseAdagrad(plain.tables.parameters(), lr=0.1, eps=1e-8)
    for each in (ours, plain):
        loss, _ = DLRMTrain(each)(batch(32))
        loss.backward()
    optimizer.step()
    tables = ours.sparse_arch.embedding_bag_collection.embedding_bags
    for name, table in plain.tables.items():
        torch.testing.assert_close(tables[name].weight, table.weight, rtol=1e-6, atol=1e-6)
    for p, q in zip(ours.dense_arch.parameters(), plain.dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLRM(collection(), 5, [16, 4], [12, 1]), r"as wide as the tables, 8; got .*4\]"),
        (lambda: OverArch(5, [1]), "at least two layers"),
        (
            lambda: SparseArch(
                EmbeddingBagCollection(
                    [EmbeddingBagConfig(5, 8, "a"), EmbeddingBagConfig(5, 4, "b")]
                )
            ),
            r"one embedding_dim, got \{'a': 8, 'b': 4\}",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
