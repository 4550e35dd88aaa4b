from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data.movielens import MovieLens, read_movielens
from shardwise.data.movielens_samples import TABLES, UNSEEN, MovieLensSamples, build_samples

TAGS = ("dark", "funny", "odd")


def edition(seed: int, num_ratings: int = 30, num_tags: int = 12) -> MovieLens:
    """A small random edition in which moments, users and movies often coincide."""
    random = np.random.default_rng(seed)
    users, movies = random.integers(1, 4, num_ratings), random.integers(1, 6, num_ratings)
    data = MovieLens(
        users=users,
        movies=movies,
        ratings=random.integers(1, 11, num_ratings) / 2,
        times=random.integers(0, 15, num_ratings),
        tag_movies=random.integers(1, 6, num_tags),
        tags=random.choice(TAGS, num_tags),
        tag_times=random.integers(0, 15, num_tags),
        catalog=np.arange(1, 6),
        release_years=np.array([0, 1950, 1969, 1969, 1970]),
        genres=((), ("War",), ("Drama", "War"), ("Drama",), ("Comedy",)),
    )
    return in_order(data)


def in_order(data: MovieLens) -> MovieLens:
    rows = np.lexsort((data.movies, data.users, data.times))
    tags = np.lexsort((data.tags, data.tag_movies, data.tag_times))
    columns = {name: getattr(data, name)[rows] for name in ("users", "movies", "ratings", "times")}
    columns |= {name: getattr(data, name)[tags] for name in ("tag_movies", "tags", "tag_times")}
    return replace(data, **columns)


def rewrite_from(data: MovieLens, moment: int, seed: int) -> MovieLens:
    """Change the ratings and tags of a moment, and everything about what comes after it."""
    random = np.random.default_rng(seed)
    now, later = data.times >= moment, data.times > moment
    tags_now, tags_later = data.tag_times >= moment, data.tag_times > moment
    size, num_tags = len(data.times), len(data.tags)
    changed = replace(
        data,
        ratings=np.where(now, random.integers(1, 11, size) / 2, data.ratings),
        users=np.where(later, random.integers(1, 6, size), data.users),
        movies=np.where(later, random.integers(1, 6, size), data.movies),
        times=np.where(later, random.integers(moment + 1, moment + 9, size), data.times),
        tag_movies=np.where(tags_now, random.integers(1, 6, num_tags), data.tag_movies),
        tags=np.where(tags_now, random.choice((*TAGS, "new"), num_tags), data.tags),
        tag_times=np.where(tags_later, random.integers(moment, 30, num_tags), data.tag_times),
    )
    return in_order(changed)


def features(samples: MovieLensSamples) -> list[tuple[list[float], dict[str, list[int]]]]:
    """The features of each rating, in time order."""
    found = []
    for part in (samples.train, samples.test):
        bags = part.batch().sparse_features.to_dict()
        lists = {key: [bag.tolist() for bag in bags[key].to_dense()] for key in bags}
        for row, dense in enumerate(part.dense.tolist()):
            found.append((dense, {key: lists[key][row] for key in lists}))
    return found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), moment=st.integers(3, 14))
def test_nothing_from_the_rated_moment_or_after_it_reaches_a_feature(seed, moment):
    data = edition(seed)
    changed = rewrite_from(data, moment, seed)
    known = int((data.times <= moment).sum())
    before = features(build_samples(data, train_fraction=0.7, history_length=3))
    after = features(build_samples(changed, train_fraction=0.7, history_length=3))
    assert before[:known] == after[:known]


def test_the_past_reaches_the_features():
    data = edition(0)
    ratings = data.ratings.copy()
    ratings[0] = 1.0 if ratings[0] >= 4 else 5.0
    before = features(build_samples(data))
    after = features(build_samples(replace(data, ratings=ratings)))
    assert before[-1][0] != after[-1][0]
    assert any(a[1]["liked"] != b[1]["liked"] for a, b in zip(before, after, strict=True))


def story() -> MovieLens:
    """User 1 likes movie 2, dislikes 3, and meets 4 and 5 at one moment; user 2 comes late."""
    return MovieLens(
        users=np.array([1, 1, 1, 1, 2]),
        movies=np.array([2, 3, 4, 5, 5]),
        ratings=np.array([4.0, 3.5, 5.0, 1.0, 4.0]),
        times=np.array([10, 20, 30, 30, 40]),
        tag_movies=np.array([5, 5, 5, 5]),
        tags=np.array(["odd", "dark", "odd", "new"]),
        tag_times=np.array([5, 30, 35, 40]),
        catalog=np.arange(1, 6),
        release_years=np.zeros(5, np.int64),
        genres=((), ("War",), ("Drama", "War"), ("Drama",), ()),
    )


def test_bags_tell_the_story_so_far():
    bags = [bags for _, bags in features(build_samples(story()))]
    assert [bag["movie"] for bag in bags] == [[1], [2], [3], [4], [4]]
    assert [bag["liked"] for bag in bags] == [[], [1], [1], [1], []]
    assert [bag["disliked"] for bag in bags] == [[], [], [2], [2], []]
    assert [bag["genres"] for bag in bags] == [[2], [1, 2], [1], [], []]
    assert [bag["tags"] for bag in bags] == [[], [], [], [1], [1, 2, 1]]


def test_labels_are_four_stars_or_more():
    samples = build_samples(story())
    assert samples.train.labels.tolist() == [1, 0, 1, 0]
    assert samples.test.labels.tolist() == [1]


def test_what_first_appears_after_the_cut_is_unseen():
    samples = build_samples(story(), train_fraction=0.4)
    test = samples.test.batch().sparse_features.to_dict()
    assert test["user"].values().tolist() == [1, 1, UNSEEN]
    assert test["movie"].values().tolist() == [UNSEEN] * 3
    assert samples.num_ids == {
        "user": 2,
        "movie": 3,
        "genres": 3,
        "liked": 3,
        "disliked": 3,
        "tags": 2,
    }


def test_bags_are_cut_to_the_latest():
    data = replace(story(), ratings=np.full(5, 5.0), times=np.arange(5), users=np.ones(5, np.int64))
    liked = [bags["liked"] for _, bags in features(build_samples(data, history_length=2))]
    assert liked == [[], [1], [1, 2], [2, 3], [3, 4]]


@pytest.fixture(scope="module")
def shipped() -> MovieLensSamples:
    pytest.importorskip("polars")
    return build_samples(read_movielens())


def test_ids_of_the_training_part_fill_their_tables(shipped):
    bags = shipped.train.batch().sparse_features.to_dict()
    for key in ("user", "movie"):
        assert bags[key].values().unique().tolist() == list(range(1, shipped.num_ids[key]))
    for key, bag in bags.items():
        assert int(bag.values().max()) < shipped.num_ids[key]


def test_dense_features_are_finite_and_of_unit_scale(shipped):
    shipped.train.batch().validate(shipped.dense_names)
    shipped.test.batch().validate(shipped.dense_names)
    assert shipped.train.dense.shape == (80_668, len(shipped.dense_names))
    assert float(shipped.train.dense.abs().mean(0).max()) < 3
    assert float(shipped.train.dense.abs().max()) < 12


def test_every_feature_has_a_table_that_holds_its_ids(shipped):
    features = [feature for shared in TABLES.values() for feature in shared]
    assert sorted(features) == sorted(shipped.train.keys)
    for shared in TABLES.values():
        assert len({shipped.num_ids[feature] for feature in shared}) == 1
