"""MovieLens as a problem: will this user like this movie?"""

import torch

from shardwise.cli import clicks
from shardwise.cli.data_config import MovieLensConfig
from shardwise.cli.problem import Figures, Problem
from shardwise.data.movielens import MovieLens, read_movielens
from shardwise.data.movielens_baselines import smoothed_item_rate, user_and_item_rate
from shardwise.data.movielens_samples import TABLES, build_samples


def load_movielens(config: MovieLensConfig) -> Problem:
    """Read the edition and make samples of it."""
    data = read_movielens(config.root or None, config.edition)
    samples = build_samples(
        data,
        train_fraction=config.train_fraction,
        history_length=config.history_length,
        max_tags=config.max_tags,
    )
    labels = samples.test.labels

    def rivals() -> dict[str, Figures]:
        chances = _simple_predictions(data, config.train_fraction)
        return {name: clicks.score(chance, labels) for name, chance in chances.items()}

    return Problem(
        train=samples.train,
        test=samples.test,
        tables=TABLES,
        num_ids=samples.num_ids,
        dense_names=samples.dense_names,
        samples_are="ratings",
        metrics=clicks.METRICS,
        judge=clicks.judge,
        is_better=clicks.is_better,
        rivals=rivals,
    )


def _simple_predictions(data: MovieLens, train_fraction: float) -> dict[str, torch.Tensor]:
    """Predict the held-out ratings, in time order, without a model."""
    predictions = {
        "user rate and item rate": user_and_item_rate(data, train_fraction=train_fraction),
        "smoothed item rate": smoothed_item_rate(data, train_fraction=train_fraction),
    }
    return {name: torch.from_numpy(chance) for name, chance in predictions.items()}
