"""A keyed jagged tensor on the wire: what a rank sends in an all-to-all, and how it is cut.

Each rank sends, per destination, the lengths, values, strides (only where keys differ in their
number of samples) and weights (only if there are any) of a run of keys. What arrives lies
[source rank][key][sample] and is permuted to [key][source rank][sample].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Integer
from torch import Tensor

from shardwise.jagged.layout import feature_major, segment_sums
from shardwise.ops.permute import permute_segments


def labels(is_variable: bool, is_weighted: bool) -> list[str]:
    """Name the tensors of the message, in order."""
    return ["lengths", "values"] + ["strides"] * is_variable + ["weights"] * is_weighted


def splits(
    key_splits: Sequence[int],
    stride_per_key: Sequence[int],
    length_per_key: Sequence[int],
    is_variable: bool,
    is_weighted: bool,
) -> list[list[int]]:
    """Count, for each tensor of the message, the elements that go to each destination.

    Args:
        key_splits: Keys per destination, consecutive.
        stride_per_key: Samples per key.
        length_per_key: Values per key.
        is_variable: Whether strides are sent.
        is_weighted: Whether weights are sent.
    """
    values = segment_sums(length_per_key, key_splits)
    result = [segment_sums(stride_per_key, key_splits), values]
    return result + [list(key_splits)] * is_variable + [list(values)] * is_weighted


@dataclass(frozen=True, kw_only=True)
class Received:
    """The fields of the tensor made of what arrived from all ranks."""

    lengths: Tensor
    values: Tensor
    weights: Tensor | None
    stride: int | None
    stride_per_key_per_rank: list[list[int]] | None


def receive(
    num_keys: int,
    tensors: Sequence[Tensor],
    variable_stride_per_key: bool,
    num_workers: int,
    recat: Integer[Tensor, "..."] | None,
    stride_per_rank: Sequence[int] | None,
    stagger: int,
) -> Received:
    """Put what arrived into key-major order.

    Args:
        num_keys: Keys that each rank sent here.
        tensors: Those that `labels` names, each joined over the ranks in order.
        variable_stride_per_key: Whether strides arrived.
        num_workers: Ranks that sent.
        recat: The order of the [rank][key] segments, or of the single bags; None derives it.
        stride_per_rank: Samples of each rank; None where all sent as many. Not read where
            strides arrived.
        stagger: Interleaved groups of ranks, see `layout.feature_major`.
    """
    lengths, values = tensors[0].reshape(-1), tensors[1]
    expected = 2 + variable_stride_per_key
    weights = tensors[expected] if len(tensors) > expected else None
    num_segments = num_keys * num_workers
    bags: list[int] = []
    if variable_stride_per_key:
        bags = tensors[2].reshape(-1).tolist()
    elif stride_per_rank is not None:
        bags = [stride for stride in stride_per_rank for _ in range(num_keys)]
    elif num_segments > 0:
        bags = [lengths.numel() // num_segments] * num_segments
    order = feature_major(num_keys, num_workers, stagger)
    moves, runs = order, bags
    if recat is not None and recat.numel() > 0:
        moves = recat.tolist()
        runs = bags if len(moves) == num_segments else [1] * lengths.numel()
    if moves != list(range(len(moves))):
        lengths, values, weights = permute_segments(lengths, values, weights, moves, runs)
    strides = [[bags[s] for s in order[f * num_workers :][:num_workers]] for f in range(num_keys)]
    return Received(
        lengths=lengths,
        values=values,
        weights=weights,
        stride=None if variable_stride_per_key else (sum(strides[0]) if strides else 0),
        stride_per_key_per_rank=strides if variable_stride_per_key else None,
    )
