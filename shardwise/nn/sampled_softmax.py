"""Softmax over a catalogue of items through a sample of it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sampled_softmax_loss(
    queries: Float[Tensor, "V D"],
    positives: Float[Tensor, "V D"],
    candidates: Float[Tensor, "C D"],
    positive_ids: Int[Tensor, " V"],
    candidate_ids: Int[Tensor, " C"],
    log_expected: Float[Tensor, " C"],
) -> Float[Tensor, " V"]:
    """Give -log of each positive's probability, other items standing for all by a shared sample.

    A score is a dot product with the query. The sum of exp(score) over the items other than the
    positive is estimated by that over the candidates, each divided by how often one expects it
    among them ("logQ correction"). The estimate of the sum has no bias; the positive itself is
    always there, so it needs no correction. A candidate that is the positive is left out.

    Y. Bengio, J.-S. Senécal, "Quick Training of Probabilistic Neural Nets by Importance Sampling",
    AISTATS 2003; for batches' own positives as candidates: X. Yi et al., "Sampling-Bias-Corrected
    Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.

    Args:
        queries: What asks.
        positives: The item that each query should find.
        candidates: The sample, the same for all queries; repeats count each time.
        positive_ids: Which items the positives are.
        candidate_ids: Which items the candidates are.
        log_expected: Log of the expected count of each candidate's item in the sample: of M uniform
            draws from R items log(M / R), of all items once 0, which is the softmax itself.

    Returns:
        One loss per query, in nats, without gradient to `log_expected`.
    """
    scores = queries @ candidates.T - log_expected.detach()  # (V, C)
    is_positive = candidate_ids == positive_ids.unsqueeze(1)
    others = scores.masked_fill(is_positive, float("-inf")).logsumexp(1)
    positive = (queries * positives).sum(1)
    return torch.logaddexp(positive, others) - positive
