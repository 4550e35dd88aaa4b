"""Two simple predictions of MovieLens labels, that a model must beat to be worth its tables."""

import numpy as np
from jaxtyping import Float64

from shardwise.data.earlier import EarlierEvents
from shardwise.data.movielens import LIKED_FROM, MovieLens


def smoothed_item_rate(
    data: MovieLens, *, train_fraction: float = 0.8, strength: float = 5.0
) -> Float64[np.ndarray, " held_out"]:
    """Predict each held-out rating by how often its movie was liked in the training part.

    Args:
        data: The edition.
        train_fraction: Share of the ratings before the cut, as in `build_samples`.
        strength: How many ratings at the overall rate every movie starts with.

    Returns:
        The chance that each rating after the cut, in time order, is a liked one.
    """
    num_train = data.num_before(train_fraction)
    liked = data.ratings[:num_train] >= LIKED_FROM
    movie = np.searchsorted(data.catalog, data.movies)
    count = np.bincount(movie[:num_train], minlength=len(data.catalog))
    likes = np.bincount(movie[:num_train], liked, len(data.catalog))
    rate = (likes + strength * _overall(liked)) / (count + strength)
    return np.asarray(rate[movie[num_train:]])


def user_and_item_rate(
    data: MovieLens,
    *,
    train_fraction: float = 0.8,
    item_strength: float = 5.0,
    user_strength: float = 3.0,
) -> Float64[np.ndarray, " held_out"]:
    """Predict each held-out rating by its movie's rate and by the user's rate so far.

    The user's rate counts all of the user's ratings before the rated moment, held-out ones too. The
    log-odds of both rates are added, and those of the overall rate, which is in both, taken off.

    Args:
        data: The edition.
        train_fraction: Share of the ratings before the cut, as in `build_samples`.
        item_strength: How many ratings at the overall rate every movie starts with.
        user_strength: How many every user starts with.

    Returns:
        The chance that each rating after the cut, in time order, is a liked one.
    """
    num_train = data.num_before(train_fraction)
    liked = (data.ratings >= LIKED_FROM).astype(float)
    overall = _overall(liked[:num_train])
    past = EarlierEvents(data.users, data.times)
    user = (past.sums(liked) + user_strength * overall) / (past.counts + user_strength)
    item = smoothed_item_rate(data, train_fraction=train_fraction, strength=item_strength)
    odds = user[num_train:] / (1 - user[num_train:]) * item / (1 - item) * (1 - overall) / overall
    return np.asarray(odds / (1 + odds))


def _overall(liked: np.ndarray) -> float:
    """Give the share of likes, kept off 0 and 1 by half a like on either side."""
    return float((liked.sum() + 0.5) / (len(liked) + 1))
