"""Criteo's click logs as a problem: will this advertisement be clicked?"""

import torch

from shardwise.cli import clicks
from shardwise.cli.data_config import CriteoConfig
from shardwise.cli.logistic import logistic_regression
from shardwise.cli.problem import Figures, Problem
from shardwise.data import Samples
from shardwise.data.criteo_samples import CriteoSamples, read_criteo_samples


def load_criteo(config: CriteoConfig) -> Problem:
    """Read the first rows of a file and make samples of them."""
    samples = _read(config, config.hash_size, config.min_count)
    validation, test = _split(samples, config)

    def rivals() -> dict[str, Figures]:
        # It has a weight for every value, however rare, and lets the penalty deal with them.
        plain = _read(config, max(config.hash_size, 10_000), 1)
        chances = logistic_regression(plain.train, _split(plain, config)[1])
        rate = samples.train.labels.mean().expand(len(test))
        return {
            "hashed logistic regression": clicks.score(chances, test.labels),
            "click rate": clicks.score(rate, test.labels),
        }

    return Problem(
        train=samples.train,
        validation=validation if len(validation) else None,
        test=test,
        tables={name: (name,) for name in samples.num_ids},
        num_ids=samples.num_ids,
        dense_names=samples.dense_names,
        samples_are="rows",
        metrics=clicks.METRICS,
        judge=clicks.judge,
        is_better=clicks.is_better,
        rivals=rivals,
    )


def _read(config: CriteoConfig, hash_size: int, min_count: int) -> CriteoSamples:
    """Read the rows to train on as `train`, and those to validate and to test by as `test`."""
    return read_criteo_samples(
        config.path or None,
        num_train=config.train_rows - config.validation_rows,
        num_test=config.validation_rows + config.test_rows,
        hash_sizes=hash_size,
        min_count=min_count,
    )


def _split(samples: CriteoSamples, config: CriteoConfig) -> tuple[Samples, Samples]:
    """Part the rows to validate by from those to test by."""
    rows = torch.arange(len(samples.test))
    validation, test = rows.split([config.validation_rows, config.test_rows])
    return samples.test.select(validation), samples.test.select(test)
