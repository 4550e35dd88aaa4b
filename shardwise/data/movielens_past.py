"""Describe each MovieLens rating by counts, rates and times so far: the dense features.

A *mean so far* is `(sum + strength * prior) / (count + strength)` over strictly earlier events, so
the first event of a group starts from the prior. Stars are compared with the movie's mean at the
time (*lift*), which tells a generous user from one who picks good movies. Every number is brought
to about one by a fixed scale; none is fitted to the data, so none can carry the future.
"""

import numpy as np
from jaxtyping import Float64, Int64

from shardwise.data.earlier import EarlierEvents
from shardwise.data.movielens import LIKED_FROM, MovieLens

_YEAR_S = 365.2425 * 86400


def dense_features(data: MovieLens) -> dict[str, Float64[np.ndarray, " ratings"]]:
    """Compute the dense features of each rating, by name, in the order of the columns."""
    movie = EarlierEvents(data.movies, data.times)
    user = EarlierEvents(data.users, data.times)
    world = EarlierEvents(np.zeros_like(data.users), data.times)
    liked = (data.ratings >= LIKED_FROM).astype(float)
    world_rate = _mean_so_far(world, liked, prior=0.5, strength=10.0)
    world_stars = _mean_so_far(world, data.ratings, prior=3.5, strength=10.0)
    movie_stars = _mean_so_far(movie, data.ratings, prior=world_stars, strength=5.0)
    user_stars = _mean_so_far(user, data.ratings, prior=world_stars, strength=3.0)
    lift = data.ratings - movie_stars
    user_lift = _mean_so_far(user, lift, prior=0.0, strength=3.0)
    spread = _mean_so_far(user, (data.ratings - user_stars) ** 2, prior=1.0, strength=3.0)
    kindness = data.ratings - user_stars
    return {
        "movie_rate": _logit(_mean_so_far(movie, liked, prior=world_rate, strength=5.0)),
        "movie_stars": 2 * (movie_stars - 3.5),
        "movie_recent_stars": 2 * _mean_of_last(movie, kindness, 10),
        "movie_count": np.log1p(movie.counts) / 3,
        "user_rate": _logit(_mean_so_far(user, liked, prior=world_rate, strength=3.0)),
        "user_stars": 2 * (user_stars - 3.5),
        "user_lift": 2 * user_lift,
        "user_spread": np.log(spread),
        "user_count": np.log1p(user.counts) / 3,
        "user_lift_last_1": _mean_of_last(user, lift, 1),
        "user_lift_last_3": _mean_of_last(user, lift, 3),
        "user_lift_last_10": 2 * _mean_of_last(user, lift, 10),
        "user_lift_last_30": 2 * _mean_of_last(user, lift, 30),
        "user_lift_in_genres": 2 * _lift_in_genres(data, lift, user_lift),
        "user_lift_in_decade": 2 * _lift_among(_decades(data), data, lift, user_lift),
        "user_lift_in_popularity": 2 * _lift_among(_doublings(movie), data, lift, user_lift),
        **_times(data, user),
    }


def _mean_so_far(
    past: EarlierEvents, values: np.ndarray, *, prior: np.ndarray | float, strength: float
) -> np.ndarray:
    return np.asarray((past.sums(values) + strength * prior) / (past.counts + strength))


def _mean_of_last(past: EarlierEvents, values: np.ndarray, last: int) -> np.ndarray:
    """Average the latest earlier values; 0 where there are none."""
    return np.asarray(past.sums(values, last) / np.clip(past.counts, 1, last))


def _logit(probability: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(probability / (1 - probability)))


def _lift_among(
    kinds: np.ndarray, data: MovieLens, lift: np.ndarray, user_lift: np.ndarray
) -> np.ndarray:
    """Average the user's lift over earlier movies of the same kind; the prior is that over all."""
    past = EarlierEvents(data.users * (int(kinds.max()) + 1) + kinds, data.times)
    return _mean_so_far(past, lift, prior=user_lift, strength=3.0)


def _decades(data: MovieLens) -> Int64[np.ndarray, " ratings"]:
    """Give the decade of release, counted from 1880; 0 for an unknown year."""
    return np.asarray(np.maximum(_release_years(data) - 1880, 0) // 10)


def _doublings(movie: EarlierEvents) -> Int64[np.ndarray, " ratings"]:
    """Count how often one rating would have to double to the number the movie has so far."""
    return np.asarray(np.log2(movie.counts + 1), np.int64)


def _lift_in_genres(data: MovieLens, lift: np.ndarray, user_lift: np.ndarray) -> np.ndarray:
    """Average, over the movie's genres, the user's lift in each; over all where it has none."""
    genres, lengths, num_genres = data.genre_bags()
    rating = np.repeat(np.arange(len(lengths)), lengths)
    past = EarlierEvents(data.users[rating] * (num_genres + 1) + genres, data.times[rating])
    each = _mean_so_far(past, lift[rating], prior=user_lift[rating], strength=2.0)
    mean = np.bincount(rating, each, len(lengths)) / np.maximum(lengths, 1)
    return np.where(lengths > 0, mean, user_lift)


def _times(data: MovieLens, user: EarlierEvents) -> dict[str, np.ndarray]:
    """Tell the user's time here, the pause before this rating and the movie's age, all in logs."""
    first, latest = user.edges()
    has_past = user.counts > 0
    since_first = np.where(has_past, data.times - data.times[first], 0)
    since_latest = np.where(has_past, data.times - data.times[latest], 0)
    years = _release_years(data)
    age = np.maximum(1970 + data.times / _YEAR_S - years, 0)
    return {
        "since_first_rating": np.log1p(since_first) / 10,
        "since_latest_rating": np.log1p(since_latest) / 5,
        "movie_age": np.where(years > 0, np.log1p(age) / 2, 0),
        "release_year": np.where(years > 0, (years - 1990) / 20, 0),
    }


def _release_years(data: MovieLens) -> Int64[np.ndarray, " ratings"]:
    return data.release_years[np.searchsorted(data.catalog, data.movies)]
