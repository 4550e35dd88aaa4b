"""Retrieval: exact and FAISS indices against NumPy, queries to candidates, errors."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import ExactIndex, FaissIndex, TwoTower, TwoTowerRetrieval
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig


def highest(
    candidates: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.numpy() @ candidates.numpy().T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("num_queries", [0, 5])
def test_exact_index_equals_numpy(block_rows, k, num_queries):
    candidates, queries = torch.randn(100, 8).double(), torch.randn(num_queries, 8).double()
    scores, rows = ExactIndex(candidates, block_rows=block_rows).search(queries, k)
    expected = highest(candidates, queries, k)
    np.testing.assert_allclose(scores.numpy(), expected[0], atol=1e-12)
    assert np.array_equal(rows.numpy(), expected[1])


def test_exact_index_moves_with_its_model():
    index = ExactIndex(torch.randn(100, 8)).to("meta")
    scores, rows = index.search(torch.empty(5, 8, device="meta"), 3)
    assert (scores.device.type, rows.device.type, rows.shape) == ("meta", "meta", (5, 3))


@pytest.mark.usefixtures("no_shape_checks")
def test_exact_search_compiles_to_one_graph():
    index, queries = ExactIndex(torch.randn(100, 8), block_rows=40), torch.randn(5, 8)
    torch._dynamo.reset()
    search = torch.compile(index.search, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(search(queries, 3), index.search(queries, 3))


def test_faiss_index_equals_numpy():
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    candidates, queries = torch.randn(100, 8), torch.randn(5, 8)
    scores, rows = FaissIndex(candidates).search(queries, 10)
    expected = highest(candidates, queries, 10)
    np.testing.assert_allclose(scores.numpy(), expected[0], atol=1e-5)
    assert np.array_equal(rows.numpy(), expected[1])


def test_faiss_index_finds_all_when_it_probes_all_lists():
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    candidates, queries = torch.randn(200, 8), torch.randn(5, 8)
    _, rows = FaissIndex(candidates, "IVF4,Flat", num_probes=4).search(queries, 10)
    assert np.array_equal(rows.numpy(), highest(candidates, queries, 10)[1])


@pytest.mark.parametrize(("description", "num_probes"), [("IFV4", None), ("Flat", 4)])
def test_what_faiss_cannot_make_is_named(description, num_probes):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    message = f"FAISS cannot make '{description}' with num_probes {num_probes} of 200 candidates"
    with pytest.raises(ValueError, match=message):
        FaissIndex(torch.randn(200, 8), description, num_probes=num_probes)


def test_absent_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'shardwise\[retrieval\]'"):
        FaissIndex(torch.randn(100, 8))


# ---- queries to candidates


def towers() -> TwoTower:
    configs = [EmbeddingBagConfig(50, 4, name, feature_names=[name]) for name in ("user", "movie")]
    return TwoTower(EmbeddingBagCollection(configs), [8, 4])


def one_id_each(key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([key], ids, lengths=torch.ones_like(ids))


@pytest.mark.parametrize("make_index", [ExactIndex, partial(ExactIndex, block_rows=7)])
def test_each_query_gets_its_best_candidates(make_index):
    model = towers()
    candidates = model.embed_candidates(one_id_each("movie", torch.arange(50))).detach()
    queries = one_id_each("user", torch.tensor([3, 1, 4]))
    scores, rows = TwoTowerRetrieval(model, candidates, 10, make_index=make_index)(queries)
    expected = highest(candidates, model.embed_queries(queries).detach(), 10)
    np.testing.assert_allclose(scores.numpy(), expected[0], atol=1e-6)
    assert np.array_equal(rows.numpy(), expected[1])
    assert not scores.requires_grad


def test_scores_of_found_pairs_are_those_of_the_towers():
    model = towers()
    candidates = model.embed_candidates(one_id_each("movie", torch.arange(50)))
    scores, rows = TwoTowerRetrieval(model, candidates, 1)(one_id_each("user", torch.arange(50)))
    ids = torch.cat([torch.arange(50), rows[:, 0]])
    pairs = KeyedJaggedTensor(["user", "movie"], ids, lengths=torch.ones_like(ids))
    query, candidate = model(pairs)
    torch.testing.assert_close((query * candidate).sum(1), scores[:, 0])


# ---- refused


def test_search_names_widths_and_counts():
    index = ExactIndex(torch.randn(100, 8))
    with pytest.raises(ValueError, match=r"queries of width 7 and k 3; the 100 .* have width 8"):
        index.search(torch.randn(5, 7), 3)
    with pytest.raises(ValueError, match="queries of width 8 and k 101; the 100 candidates"):
        index.search(torch.randn(5, 8), 101)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="got 0 candidates and block_rows 65536"):
        ExactIndex(torch.empty(0, 8))
    with pytest.raises(ValueError, match="100 candidates and block_rows 0"):
        ExactIndex(torch.randn(100, 8), block_rows=0)
    with pytest.raises(ValueError, match="from 1 to the number of candidates, 5, got 6"):
        TwoTowerRetrieval(towers(), torch.randn(5, 4), 6)
