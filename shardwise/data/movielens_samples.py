"""Turn MovieLens into samples for a click-style model: will this user like this movie?

Each rating is one sample. Its features use only what happened strictly before it, and the moment
itself: every look at the past goes through `EarlierEvents`. Ids are numbered by first appearance,
so that a later event cannot renumber an earlier one, and no scale is fitted to the data.

Sparse features: `user`, `movie`, `genres` (of the movie), `liked` and `disliked` (the user's latest
movies of either kind), `tags` (given to the movie so far). Dense features: those of
`movielens_past`. Label: 1 for a rating of 4 stars or more.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64

from shardwise.data.earlier import EarlierEvents
from shardwise.data.movielens import LIKED_FROM, MovieLens
from shardwise.data.movielens_past import dense_features
from shardwise.data.samples import Samples

TABLES = {
    "user": ("user",),
    "movie": ("movie", "liked", "disliked"),
    "genres": ("genres",),
    "tags": ("tags",),
}
"""The features that share their ids, and so can share a table, by the name of the table."""

UNSEEN = 0
"""The id of every user, movie, genre or tag that the training part does not hold."""


@dataclass(frozen=True, kw_only=True)
class MovieLensSamples:
    """The two parts of an edition, cut at one moment.

    Attributes:
        train: The samples before the moment, in time order.
        test: The others, in time order.
        num_ids: Per sparse feature, the rows its table needs.
        dense_names: What the dense columns are called.
    """

    train: Samples
    test: Samples
    num_ids: dict[str, int]
    dense_names: tuple[str, ...]


def build_samples(
    data: MovieLens,
    *,
    train_fraction: float = 0.8,
    history_length: int = 20,
    max_tags: int = 10,
) -> MovieLensSamples:
    """Make a sample of every rating and cut them in two by time.

    Args:
        data: The edition, sorted by time as it is read.
        train_fraction: Share of the ratings before the cut. Ratings at the same moment as the cut
            are all after it.
        history_length: Most movies in a bag of `liked` or `disliked`, the latest ones.
        max_tags: Most tags in a bag, the latest ones.
    """
    num_train = data.num_before(train_fraction)
    columns = dense_features(data)
    dense = np.stack(list(columns.values()), axis=1)
    bags, num_ids = _sparse_features(data, num_train, history_length, max_tags)
    samples = Samples(
        dense=torch.from_numpy(dense.astype(np.float32)),
        labels=torch.from_numpy((data.ratings >= LIKED_FROM).astype(np.float32)),
        keys=tuple(bags),
        values=torch.from_numpy(np.concatenate([values for values, _ in bags.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in bags.values()])),
    )
    every = torch.arange(len(data.times))
    return MovieLensSamples(
        train=samples.select(every[:num_train]),
        test=samples.select(every[num_train:]),
        num_ids=num_ids,
        dense_names=tuple(columns),
    )


_Bag = tuple[Int64[np.ndarray, " values"], Int64[np.ndarray, " samples"]]


def _sparse_features(
    data: MovieLens, num_train: int, history_length: int, max_tags: int
) -> tuple[dict[str, _Bag], dict[str, int]]:
    """Build the bag of ids of each sample and feature, and count the ids per feature."""
    users, num_users = _ids_by_first_appearance(data.users, num_train)
    movies, num_movies = _ids_by_first_appearance(data.movies, num_train)
    num_early_tags = int(np.searchsorted(data.tag_times, data.times[num_train]))
    tags, num_tags = _ids_by_first_appearance(data.tags, num_early_tags)
    genres, genre_lengths, num_genres = data.genre_bags()
    liked = data.ratings >= LIKED_FROM
    past_tags = EarlierEvents(data.tag_movies, data.tag_times, data.movies, data.times)
    tag_positions, tag_lengths = past_tags.bags(max_tags)
    ones = np.ones(len(users), np.int64)
    bags = {
        "user": (users, ones),
        "movie": (movies, ones),
        "genres": (genres, genre_lengths),
        "liked": _history(data, movies, liked, history_length),
        "disliked": _history(data, movies, ~liked, history_length),
        "tags": (tags[tag_positions], tag_lengths),
    }
    counts = (num_users, num_movies, num_genres + 1, num_movies, num_movies, num_tags)
    return bags, dict(zip(bags, counts, strict=True))


def _ids_by_first_appearance(
    items: np.ndarray, num_known: int
) -> tuple[Int64[np.ndarray, " items"], int]:
    """Number items 1, 2, … as they first appear; those that first appear too late are UNSEEN."""
    _, first, inverse = np.unique(items, return_index=True, return_inverse=True)
    ids = np.empty(len(first), np.int64)
    ids[np.argsort(first)] = np.arange(1, len(first) + 1)
    num_ids = int((first < num_known).sum()) + 1
    ids[first >= num_known] = UNSEEN
    return ids[inverse], num_ids


def _history(
    data: MovieLens,
    movies: Int64[np.ndarray, " samples"],
    chosen: Bool[np.ndarray, " samples"],
    length: int,
) -> _Bag:
    """List the user's latest movies among the chosen ratings."""
    past = EarlierEvents(data.users[chosen], data.times[chosen], data.users, data.times)
    positions, lengths = past.bags(length)
    return movies[chosen][positions], lengths
