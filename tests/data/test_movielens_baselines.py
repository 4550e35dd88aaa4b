import numpy as np
import pytest

from shardwise.data.movielens import LIKED_FROM, MovieLens, read_movielens
from shardwise.data.movielens_baselines import smoothed_item_rate, user_and_item_rate


def edition() -> MovieLens:
    """Before the cut: movie 1 liked twice and disliked once. After it: users 1 and 2 on 1 and 2."""
    return MovieLens(
        users=np.array([1, 1, 2, 1, 2]),
        movies=np.array([1, 1, 1, 1, 2]),
        ratings=np.array([4.0, 5.0, 1.0, 5.0, 5.0]),
        times=np.array([0, 1, 2, 3, 3]),
        tag_movies=np.empty(0, np.int64),
        tags=np.empty(0, np.str_),
        tag_times=np.empty(0, np.int64),
        catalog=np.array([1, 2]),
        release_years=np.array([0, 0]),
        genres=((), ()),
    )


def test_item_rate_counts_the_training_part():
    overall = 2.5 / 4
    rates = smoothed_item_rate(edition(), train_fraction=0.6, strength=5.0)
    assert rates == pytest.approx([(2 + 5 * overall) / 8, overall])


def test_user_rate_counts_what_came_before():
    overall = 2.5 / 4
    item = np.array([(2 + 5 * overall) / 8, overall])
    user = np.array([(2 + 3 * overall) / 5, (0 + 3 * overall) / 4])
    odds = user / (1 - user) * item / (1 - item) * (1 - overall) / overall
    rates = user_and_item_rate(edition(), train_fraction=0.6)
    assert rates == pytest.approx(odds / (1 + odds))


def test_shipped_edition_gives_the_known_figures():
    pytest.importorskip("polars")
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    data = read_movielens()
    labels = data.ratings[data.num_before(0.8) :] >= LIKED_FROM
    assert roc_auc_score(labels, smoothed_item_rate(data)) == pytest.approx(0.6599, abs=1e-3)
    assert roc_auc_score(labels, user_and_item_rate(data)) == pytest.approx(0.7987, abs=1e-3)
