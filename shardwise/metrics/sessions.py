"""Places within sessions: the examples of one batch that carry one session id.

A session lies within one batch, as what a user was shown at once does.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def number_sessions(sessions: Shaped[Tensor, "*T B"]) -> tuple[Int[Tensor, "*T B"], int]:
    """Number the sessions so that those of different rows differ; give also how many a row has.

    Returns:
        Numbers, of which row `r` has those from `r * count` to `(r + 1) * count`; and count.
    """
    values, numbers = sessions.unique(return_inverse=True)
    rows = torch.arange(sessions.shape[:-1].numel(), device=sessions.device)
    return numbers + len(values) * rows.view(*sessions.shape[:-1], 1), len(values)


def sort_in_sessions(scores: Float[Tensor, " N"], sessions: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Give the order by session and, within it, by rising score."""
    order = scores.argsort()
    return order[sessions[order].argsort(stable=True)]


def place_in_sessions(
    scores: Float[Tensor, " N"], sessions: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Count for each example those of its session with a higher score, and with the same one.

    The same includes itself: it is at least 1.
    """
    order = sort_in_sessions(-scores, sessions)
    scores, sessions = scores[order], sessions[order]
    is_new = torch.ones_like(scores, dtype=torch.bool)
    is_new[1:] = (scores[1:] != scores[:-1]) | (sessions[1:] != sessions[:-1])
    starts = is_new.nonzero().squeeze(1)
    run = is_new.cumsum(0) - 1
    above = starts[run] - torch.searchsorted(sessions, sessions)
    tied = torch.bincount(run, minlength=len(starts))[run]
    places = torch.empty(2, len(order), dtype=torch.int64, device=order.device)
    places[:, order] = torch.stack([above, tied])
    return places[0], places[1]


def chance_of_top(
    above: Int[Tensor, "*N"], tied: Int[Tensor, "*N"], count: int
) -> Float[Tensor, "*N"]:
    """Give the chance to be among the first `count` when ties are broken at random."""
    return ((count - above).double() / tied).clamp(0, 1)


def discounted_gains(
    gains: Float[Tensor, " N"], scores: Float[Tensor, " N"], sessions: Int[Tensor, " N"], k: int
) -> Float[Tensor, " N"]:
    """Discount each gain by its place: 1 / log2(place + 1), 0 past place `k`; ties share theirs.

    The mean over all orders of what is tied: F. McSherry and M. Najork, "Computing Information
    Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008.
    """
    above, tied = place_in_sessions(scores, sessions)
    places = torch.arange(len(gains), device=gains.device)
    discounts = torch.where(places < k, 1 / (places + 2.0).double().log2(), 0.0)
    upto = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
    return gains * (upto[above + tied] - upto[above]) / tied
