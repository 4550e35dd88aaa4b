"""Two towers: values, towers alone, training, tracing, errors."""

import numpy as np
import pytest
import torch

from shardwise.data import Batch
from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import TwoTower, TwoTowerTrainTask
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

KEYS = ["user", "movie", "genres"]


def tables(**options) -> EmbeddingBagCollection:
    widths = {"user": 4, "movie": 3, "genres": 2}
    configs = [EmbeddingBagConfig(10, width, name) for name, width in widths.items()]
    return EmbeddingBagCollection(configs, **options)


def bags(num_samples: int, keys=KEYS, weighted: bool = False) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(keys) * num_samples,))
    ids = torch.randint(10, (int(lengths.sum()),))
    weights = torch.rand(len(ids)) if weighted else None
    return KeyedJaggedTensor(list(keys), ids, weights, lengths)


def numpy_mlp(layers, x: np.ndarray) -> np.ndarray:
    first, first_bias, last, last_bias = (p.detach().double().numpy() for p in layers.parameters())
    return np.maximum(x @ first.T + first_bias, 0) @ last.T + last_bias


@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_towers_equal_numpy(num_samples):
    model, features = TwoTower(tables(), [6, 5]), bags(num_samples)
    pooled = {
        key: value.detach().double().numpy() for key, value in model.ebc(features).to_dict().items()
    }
    query, candidate = (vectors.detach().numpy() for vectors in model(features))
    expected = numpy_mlp(model.query_proj, pooled["user"])
    np.testing.assert_allclose(query, expected, atol=1e-6)
    both = np.concatenate([pooled["movie"], pooled["genres"]], 1)
    np.testing.assert_allclose(candidate, numpy_mlp(model.candidate_proj, both), atol=1e-6)


def test_tables_of_the_query_are_chosen_by_name():
    model, features = TwoTower(tables(), [6, 5], query_tables=["genres", "user"]), bags(6)
    pooled = model.ebc(features)
    joined = torch.cat([pooled["user"], pooled["genres"]], 1)
    torch.testing.assert_close(model(features)[0], model.query_proj(joined))
    torch.testing.assert_close(model(features)[1], model.candidate_proj(pooled["movie"]))


@pytest.mark.parametrize("weighted", [False, True])
def test_towers_alone_need_their_own_features_only(weighted):
    model, features = TwoTower(tables(is_weighted=weighted), [6, 5]), bags(6, weighted=weighted)
    queries, candidates = features.split([1, 2])
    query, candidate = model(features)
    torch.testing.assert_close(model.embed_queries(queries), query)
    torch.testing.assert_close(model.embed_candidates(candidates), candidate)
    torch.testing.assert_close(model.embed_queries(features), query)


def test_loss_is_the_mean_cross_entropy_of_the_dot_products():
    model = TwoTower(tables(), [6, 5])
    batch = Batch(torch.empty(6, 0), bags(6), torch.randint(2, (6,)))
    loss, (detached, logits, labels) = TwoTowerTrainTask(model)(batch)
    query, candidate = (v.detach().double().numpy() for v in model(batch.sparse_features))
    scores, y = (query * candidate).sum(1), labels.numpy()
    expected = np.mean(np.log1p(np.exp(scores)) - y * scores)
    assert loss.item() == detached.item() == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(logits.numpy(), scores, atol=1e-6)
    assert loss.requires_grad
    assert not logits.requires_grad


def test_both_towers_learn():
    model = TwoTower(tables(), [8, 4])
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = torch.optim.Adam([p for n, p in model.named_parameters() if "proj" in n], 0.02)
    batch = Batch(torch.empty(64, 0), bags(64), torch.randint(2, (64,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(40):
        dense.zero_grad()
        loss, _ = TwoTowerTrainTask(model)(batch)
        loss.backward()
        dense.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_device_is_that_of_the_layers():
    devices = {
        n.split(".")[0]: p.device.type
        for n, p in TwoTower(tables(), [6, 5], "meta").named_parameters()
    }
    assert devices == {"ebc": "cpu", "query_proj": "meta", "candidate_proj": "meta"}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_training_equals_eager():
    model = TwoTower(tables(), [6, 5])
    task, batch = TwoTowerTrainTask(model), Batch(torch.empty(6, 0), bags(6), torch.ones(6))
    task(batch)[0].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(task, fullgraph=True, backend="aot_eager")(batch)[0].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


# ---- refused


@pytest.mark.parametrize("chosen", [[], KEYS, ["users"]])
def test_query_tables_must_leave_some_to_the_candidate(chosen):
    message = r"query_tables \[.*\] must be some, not all, of the tables \['user', 'movie'"
    with pytest.raises(ValueError, match=message):
        TwoTower(tables(), [4], query_tables=chosen)


def test_towers_do_not_share_features():
    configs = [EmbeddingBagConfig(10, 4, name, feature_names=["f"]) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"both towers read \['f'\]"):
        TwoTower(EmbeddingBagCollection(configs), [4])


def test_missing_feature_of_a_tower_is_named():
    model = TwoTower(tables(), [4])
    with pytest.raises(
        KeyError, match=r"wants features \['movie', 'genres'\].*missing \['genres'\]"
    ):
        model.embed_candidates(bags(6, ["movie"]))


def test_batches_that_vary_need_all_keys():
    model = TwoTower(tables(), [4], query_tables=["user", "movie"])
    features = KeyedJaggedTensor(
        ["user", "movie"],
        torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
    )
    with pytest.raises(ValueError, match=r"batches vary, so \['genres'\] cannot be filled in"):
        model.embed_queries(features)


def test_labels_must_be_one_per_sample():
    batch = Batch(torch.empty(6, 0), bags(6), torch.ones(6, 1))
    message = r"TwoTowerTrainTask: labels have shape \[6, 1\], logits \[6\]"
    with pytest.raises(ValueError, match=message):
        TwoTowerTrainTask(TwoTower(tables(), [4]))(batch)
