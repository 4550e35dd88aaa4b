"""The sampled softmax: its value and gradients equal NumPy, and it estimates the softmax itself."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shardwise.nn import sampled_softmax_loss

ITEMS, QUERIES, WIDTH = 30, 7, 4


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, items, and the positive of each query."""
    queries = torch.randn(QUERIES, WIDTH, dtype=torch.float64)
    items = torch.randn(ITEMS, WIDTH, dtype=torch.float64)
    return queries, items, torch.randint(ITEMS, (QUERIES,))


def loss_of(queries, items, positives, candidates, log_expected) -> torch.Tensor:
    return sampled_softmax_loss(
        queries, items[positives], items[candidates], positives, candidates, log_expected
    )


def test_loss_equals_numpy():
    queries, items, positives = case()
    candidates = torch.randint(ITEMS, (50,))  # repeats, and positives among them
    log_expected = torch.randn(50, dtype=torch.float64)
    expected = []
    for query, positive in zip(queries.numpy(), positives.tolist(), strict=True):
        scores = items.numpy() @ query
        others = [
            np.exp(scores[item] - log_q)
            for item, log_q in zip(candidates.tolist(), log_expected.tolist(), strict=True)
            if item != positive
        ]
        total = np.exp(scores[positive]) + np.sum(others)
        expected.append(np.log(total) - scores[positive])
    loss = loss_of(queries, items, positives, candidates, log_expected)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_all_items_once_give_the_softmax_and_its_gradients():
    queries, items, positives = case()
    inputs = [queries.requires_grad_(), items.requires_grad_()]
    every = torch.arange(ITEMS)
    loss = loss_of(queries, items, positives, every, torch.zeros(ITEMS, dtype=torch.float64))
    softmax = F.cross_entropy(queries @ items.T, positives, reduction="none")
    torch.testing.assert_close(loss, softmax)
    wanted = torch.autograd.grad(softmax.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), inputs), wanted)


@pytest.mark.parametrize("is_uniform", [True, False])
def test_estimate_of_the_sum_has_no_bias(is_uniform):
    queries, items, positives = case()
    shares = (torch.ones(ITEMS) if is_uniform else torch.rand(ITEMS) + 0.1).double()
    shares /= shares.sum()
    scores = queries @ items.T
    own = scores.gather(1, positives[:, None])[:, 0]
    mean = torch.zeros(QUERIES, dtype=torch.float64)  # over all samples of one candidate
    for drawn, share in zip(torch.arange(ITEMS)[:, None], shares[:, None], strict=True):
        mean += share * (loss_of(queries, items, positives, drawn, share.log()) + own).exp()
    torch.testing.assert_close(mean, scores.exp().sum(1))


def test_candidates_that_are_the_positive_add_nothing():
    queries, items, _ = case()
    positives = torch.full((QUERIES,), 3)
    loss = loss_of(queries, items, positives, torch.tensor([3, 3]), torch.zeros(2).double())
    torch.testing.assert_close(loss, torch.zeros(QUERIES).double(), rtol=0, atol=1e-12)


def test_scores_far_apart_neither_overflow_nor_lose_the_gradient():
    queries = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    items = torch.tensor([[1.0], [2.0]])
    loss = loss_of(queries, items, torch.tensor([0, 0]), torch.tensor([1]), torch.zeros(1))
    loss.sum().backward()
    assert loss.tolist() == [1000.0, 0.0]
    assert queries.grad.tolist() == [[1.0], [0.0]]
