"""Sequences as a problem: which item will this user take next?"""

import numpy as np
import torch
from torch import Tensor, nn

from shardwise.cli.data_config import SequencesConfig
from shardwise.cli.problem import Figures, Problem
from shardwise.cli.ranks import Ranks
from shardwise.data import (
    SequenceSamples,
    held_out_samples,
    leave_one_out,
    read_sequences,
    training_samples,
)
from shardwise.jagged import JaggedTensor, KeyedJaggedTensor
from shardwise.metrics import RetrievalMetrics
from shardwise.models import SASRec

_BATCH_SIZE = 256
"""Users judged at once; each has a score for every item."""


def load_sequences(config: SequencesConfig) -> Problem:
    """Read the sequences and hold out the last two items of each user."""
    parts = leave_one_out(read_sequences(config.path or None))
    num_items = parts.train.num_items
    test = held_out_samples(parts.test, max_length=config.max_length)
    counts = np.bincount(parts.train.items, minlength=num_items + 1)

    def rivals() -> dict[str, Figures]:
        return {"most taken items": judge(_Popularity(torch.from_numpy(counts)), test, Ranks())}

    return Problem(
        train=training_samples(parts.train, max_length=config.max_length),
        validation=held_out_samples(parts.validation, max_length=config.max_length),
        test=test,
        tables={"item": ("item",), "position": ("position",)},
        num_ids={"item": num_items + 1, "position": config.max_length},
        samples_are="users",
        metrics={},
        judge=judge,
        is_better=lambda figures, than: figures["NDCG@10"] > than["NDCG@10"],
        rivals=rivals,
    )


@torch.no_grad()
def judge(model: nn.Module, samples: SequenceSamples, ranks: Ranks) -> Figures:
    """Rank the item that each user took next among all but those taken before.

    Args:
        model: Scores every item as `SASRec.score` does; it is left in training mode if it was in
            it.
        samples: Users and the item that each took next.
        ranks: Who judges them, each a share.

    Returns:
        HR@10, the share of users whose item is among the first ten; NDCG@10, which counts it more
        the nearer to the top it is; MRR, the mean of 1 / rank.
    """
    assert isinstance(model, SASRec | _Popularity), f"{type(model).__name__} scores no items"
    was_training = model.training
    model.eval()
    metrics = RetrievalMetrics([10])
    for together in torch.arange(len(samples)).split(_BATCH_SIZE):
        rows = together.tensor_split(ranks.count)[ranks.rank]
        batch = samples.select(rows).batch()
        scores = model.score(batch.features)
        scores[:, 0] = -torch.inf  # items count from 1
        taken = samples.sequences.take(rows.numpy())
        items, lengths = torch.from_numpy(taken.items), torch.from_numpy(taken.lengths)
        took_next = JaggedTensor(batch.targets, lengths=torch.ones_like(rows))
        metrics.update(scores, took_next, excluded=JaggedTensor(items, lengths=lengths))
    model.train(was_training)
    for total in (metrics.sums, metrics.count):
        total.copy_(ranks.gather(total[None], [1] * ranks.count, "figures of all users").sum(0))
    found = metrics.compute()
    return {"HR@10": found["hr@10"], "NDCG@10": found["ndcg@10"], "MRR": found["mrr"]}


class _Popularity(nn.Module):
    """Scores items by how often they were taken, whoever asks."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self._counts = counts.float()

    def score(self, features: KeyedJaggedTensor) -> Tensor:
        return self._counts.repeat(features.stride(), 1)
