"""Sequences as samples of a causal model, which `SampleLoader` shuffles, hands out and resumes."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from shardwise.data.sequences import HeldOut, Sequences
from shardwise.jagged import KeyedJaggedTensor, Pipelineable


@dataclass
class SequenceBatch(Pipelineable):
    """Sequences of items, and what came next.

    Attributes:
        features: One key, the items of each sequence, oldest first.
        targets: To train, the item after each of those of `features`; to be judged by, the item
            after each sequence.
    """

    features: KeyedJaggedTensor
    targets: Int64[Tensor, " targets"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SequenceBatch":
        """Copy to a device; what lies there already is shared."""
        return SequenceBatch(
            features=self.features.to(device=device, non_blocking=non_blocking),
            targets=self.targets.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work queued on `stream` is done."""
        self.features.record_stream(stream)
        self.targets.record_stream(stream)

    def pin_memory(self) -> "SequenceBatch":
        """Copy to page-locked memory, from which a GPU can copy in the background."""
        return SequenceBatch(features=self.features.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True, kw_only=True)
class SequenceSamples:
    """One sample per user; made by `training_samples` or `held_out_samples`.

    Attributes:
        sequences: What the users took.
        held_out: What each took next; None to learn, from each item, the one after it.
        max_length: Most items of a sequence in a batch, the latest ones.
        key: What batches call the items.
    """

    sequences: Sequences
    held_out: Int64[np.ndarray, " users"] | None
    max_length: int
    key: str

    def __post_init__(self) -> None:
        """Check the length.

        Raises:
            ValueError: It is under 1.
        """
        if self.max_length < 1:
            raise ValueError(f"SequenceSamples: max_length is {self.max_length}; at least 1")

    def __len__(self) -> int:
        """Give the number of users."""
        return len(self.sequences)

    def select(self, rows: Int64[Tensor, " B"]) -> "SequenceSamples":
        """Copy some samples, no longer than a batch needs them, in the order asked for."""
        places = rows.numpy()
        is_training = self.held_out is None
        return SequenceSamples(
            sequences=self.sequences.take(places, max_length=self.max_length + is_training),
            held_out=None if self.held_out is None else self.held_out[places],
            max_length=self.max_length,
            key=self.key,
        )

    def batch(self) -> SequenceBatch:
        """Give all samples as one batch."""
        every = np.arange(len(self))
        if self.held_out is not None:
            sequences = self.sequences.take(every, max_length=self.max_length)
            items, lengths, targets = sequences.items, sequences.lengths, self.held_out
        else:
            sequences = self.sequences.take(every, max_length=self.max_length + 1)
            is_first, is_last = np.zeros((2, len(sequences.items)), bool)
            is_first[sequences.starts] = True
            is_last[sequences.starts + sequences.lengths - 1] = True
            items, targets = sequences.items[~is_last], sequences.items[~is_first]
            lengths = sequences.lengths - 1
        features = KeyedJaggedTensor(
            [self.key], torch.from_numpy(items), lengths=torch.from_numpy(lengths)
        )
        return SequenceBatch(features=features, targets=torch.from_numpy(targets))


def training_samples(
    sequences: Sequences, *, max_length: int, key: str = "item"
) -> SequenceSamples:
    """Learn the item after each item.

    Users with a single item, which nothing follows, are left out.

    Args:
        sequences: What the users took.
        max_length: Most items of a sequence in a batch, the latest ones; each has its target.
        key: What batches call the items.
    """
    learnable = sequences.take(np.flatnonzero(sequences.lengths >= 2))
    return SequenceSamples(sequences=learnable, held_out=None, max_length=max_length, key=key)


def held_out_samples(held_out: HeldOut, *, max_length: int, key: str = "item") -> SequenceSamples:
    """Foretell one item per user.

    Args:
        held_out: The item of each user, and those before it.
        max_length: Most items of a sequence in a batch, the latest ones.
        key: What batches call the items.
    """
    return SequenceSamples(
        sequences=held_out.histories,
        held_out=held_out.targets,
        max_length=max_length,
        key=key,
    )
