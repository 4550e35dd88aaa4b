"""Retrieval metrics equal NumPy, with ties, several relevant items, none, and excluded ones."""

import math

import numpy as np
import pytest
import torch

from shardwise.jagged import JaggedTensor
from shardwise.metrics import (
    RetrievalMetrics,
    hit_rate_at,
    ndcg_at,
    rank_relevant,
    recall_at,
    reciprocal_rank,
)

METRICS = {"hr": hit_rate_at, "recall": recall_at, "ndcg": ndcg_at}


def bags_of(lists: list[list[int]]) -> JaggedTensor:
    values = torch.tensor([value for one in lists for value in one], dtype=torch.int64)
    return JaggedTensor(values, lengths=torch.tensor([len(one) for one in lists]))


def random_case(generator: np.random.Generator, samples: int, items: int):
    """Scores of few levels, so that many tie; up to 4 relevant and 4 excluded items, disjoint."""
    scores = generator.integers(0, 6, (samples, items)) / 4.0
    counts = generator.integers(0, 5, (samples, 2))
    picked = [generator.permutation(items)[: sum(count)].tolist() for count in counts]
    relevant = [items[: count[0]] for items, count in zip(picked, counts, strict=True)]
    excluded = [items[count[0] :] for items, count in zip(picked, counts, strict=True)]
    return scores, relevant, excluded


def expected_ranks(scores: np.ndarray, relevant: list[int], excluded: list[int]) -> list[int]:
    candidates = [item for item in range(len(scores)) if item not in excluded]
    by_rank = sorted(candidates, key=lambda item: (-scores[item], item in relevant))
    return [rank for rank, item in enumerate(by_rank, start=1) if item in relevant]


def expected_metrics(ranks: list[int], cutoff: int) -> dict[str, float]:
    if not ranks:
        return dict.fromkeys([*METRICS, "mrr"], math.nan)
    hits = [rank for rank in ranks if rank <= cutoff]
    best = sum(1 / np.log2(r + 1) for r in range(1, min(len(ranks), cutoff) + 1))
    return {
        "hr": float(bool(hits)),
        "recall": len(hits) / len(ranks),
        "ndcg": sum(1 / np.log2(r + 1) for r in hits) / best,
        "mrr": 1 / ranks[0],
    }


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_numpy_with_ties(seed):
    scores, relevant, excluded = random_case(np.random.default_rng(seed), 40, 12)
    ranks = rank_relevant(torch.from_numpy(scores), bags_of(relevant), bags_of(excluded))
    rows = zip(scores, relevant, excluded, strict=True)
    assert [bag.tolist() for bag in ranks.to_dense()] == [expected_ranks(*row) for row in rows]


@pytest.mark.parametrize("cutoff", [1, 3, 10, 50])
@pytest.mark.parametrize("name", METRICS)
def test_metric_at_cutoff_equals_numpy(name, cutoff):
    scores, relevant, _ = random_case(np.random.default_rng(cutoff), 60, 12)
    ranks = rank_relevant(torch.from_numpy(scores), bags_of(relevant))
    each = [expected_ranks(*row, []) for row in zip(scores, relevant, strict=True)]
    wanted = [expected_metrics(ranks, cutoff)[name] for ranks in each]
    np.testing.assert_allclose(METRICS[name](ranks, cutoff).numpy(), wanted, rtol=1e-12)


def test_reciprocal_rank_equals_numpy():
    scores, relevant, _ = random_case(np.random.default_rng(9), 60, 12)
    ranks = rank_relevant(torch.from_numpy(scores), bags_of(relevant))
    each = [expected_ranks(*row, []) for row in zip(scores, relevant, strict=True)]
    wanted = [expected_metrics(ranks, 1)["mrr"] for ranks in each]
    np.testing.assert_allclose(reciprocal_rank(ranks).numpy(), wanted, rtol=1e-12)


def test_means_over_batches_equal_numpy():
    scores, relevant, excluded = random_case(np.random.default_rng(7), 50, 12)
    metrics = RetrievalMetrics([2, 5])
    for part in (slice(0, 30), slice(30, 30), slice(30, 50)):
        given = torch.from_numpy(scores[part]).float()
        metrics.update(given, bags_of(relevant[part]), bags_of(excluded[part]))
    each = [expected_ranks(*row) for row in zip(scores, relevant, excluded, strict=True)]
    wanted = {
        f"{name}@{cutoff}": np.nanmean([expected_metrics(ranks, cutoff)[name] for ranks in each])
        for name in METRICS
        for cutoff in (2, 5)
    } | {"mrr": np.nanmean([expected_metrics(ranks, 2)["mrr"] for ranks in each])}
    assert metrics.compute() == pytest.approx(wanted, rel=1e-12)


def test_model_that_scores_all_alike_finds_nothing():
    ranks = rank_relevant(torch.zeros(3, 100), bags_of([[0], [50], [99]]))
    assert ranks.values().tolist() == [100, 100, 100]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_relevant_item_without_a_score_ranks_last(bad):
    scores = torch.arange(5.0).repeat(2, 1)
    scores[0, 4] = bad
    assert rank_relevant(scores, bags_of([[4], [4]])).values().tolist() == [5, 1]


def test_nan_of_another_item_counts_against_the_model():
    scores = torch.tensor([[3.0, math.nan, 1.0]])
    assert rank_relevant(scores, bags_of([[0]])).values().tolist() == [2]


def test_relevant_item_that_is_excluded_ranks_last():
    scores = torch.arange(5.0)[None]
    assert rank_relevant(scores, bags_of([[4, 3]]), bags_of([[4]])).values().tolist() == [1, 5]


def test_scores_are_not_modified():
    scores = torch.arange(5.0)[None]
    rank_relevant(scores, bags_of([[4]]), bags_of([[1, 2]]))
    assert scores.tolist() == [[0, 1, 2, 3, 4]]


def test_no_samples_give_nan():
    assert all(math.isnan(value) for value in RetrievalMetrics().compute().values())


def _on_rank(rank: int, world_size: int) -> dict[str, float]:
    scores, relevant, excluded = random_case(np.random.default_rng(3), 31, 12)
    own = slice(0, 0) if rank == 2 else slice(rank, None, 2)  # the last rank has no samples
    metrics = RetrievalMetrics([3], process_group=torch.distributed.group.WORLD)
    given = torch.from_numpy(scores[own])
    metrics.update(given, bags_of(relevant[own]), bags_of(excluded[own]))
    return metrics.compute()


def test_three_ranks_equal_one_process(ranks):
    scores, relevant, excluded = random_case(np.random.default_rng(3), 31, 12)
    one = RetrievalMetrics([3])
    one.update(torch.from_numpy(scores), bags_of(relevant), bags_of(excluded))
    for result in ranks(3, _on_rank):
        assert result == pytest.approx(one.compute(), rel=1e-12)


def test_bags_must_be_one_per_sample():
    with pytest.raises(ValueError, match=r"2 bags of excluded items for 1 samples"):
        rank_relevant(torch.zeros(1, 3), bags_of([[0]]), bags_of([[1], [2]]))


def test_cutoff_must_be_positive():
    with pytest.raises(ValueError, match=r"at least 1, got \[10, 0\]"):
        RetrievalMetrics([10, 0])
