"""Checks of jagged input, on demand: each error names the key, the sample and the value.

They read the data, so on an accelerator they wait for the device.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

_Inverse = tuple[list[str], Tensor]


@runtime_checkable
class TableRange(Protocol):
    """What a table's config says about the ids it takes."""

    name: str
    num_embeddings: int
    feature_names: list[str]


def _first(is_bad: Tensor) -> int | None:
    """Give the position of the first True, or None; one synchronisation when all is well."""
    return int(is_bad.int().argmax()) if bool(is_bad.any()) else None


class _Bags:
    """Which key and sample a position among the lengths belongs to, for messages."""

    def __init__(self, keys: Sequence[str] | None, strides: Sequence[int]) -> None:
        self.owner = "JaggedTensor" if keys is None else "KeyedJaggedTensor"
        self._keys = keys
        self._strides = strides

    def name(self, position: int) -> str:
        if self._keys is None:
            return f"{self.owner}, sample {position}"
        for key, stride in zip(self._keys, self._strides, strict=True):
            if position < stride:
                return f"{self.owner}, key {key!r}, sample {position}"
            position -= stride
        return f"{self.owner}, behind the last key"


def _check_lengths(bags: _Bags, lengths: Tensor, num_values: int) -> None:
    bad = _first(lengths < 0)
    if bad is not None:
        raise ValueError(
            f"{bags.name(bad)}: length {int(lengths[bad])} is negative; lengths must be >= 0"
        )
    total = int(lengths.sum(dtype=torch.int64))
    if total != num_values:
        raise ValueError(
            f"{bags.owner}: lengths sum to {total} but there are {num_values} values; "
            f"the sum of all lengths must be the number of values"
        )


def _check_offsets(bags: _Bags, offsets: Tensor, num_values: int) -> None:
    if offsets.numel() == 0 or int(offsets[0]) != 0:
        first = int(offsets[0]) if offsets.numel() > 0 else "nothing"
        raise ValueError(f"{bags.owner}: offsets start with {first}; they must start with 0")
    bad = _first(offsets[1:] < offsets[:-1])
    if bad is not None:
        raise ValueError(
            f"{bags.name(bad)}: offsets decrease from {int(offsets[bad])} to "
            f"{int(offsets[bad + 1])}; they may never decrease"
        )
    if int(offsets[-1]) != num_values:
        raise ValueError(
            f"{bags.owner}: offsets end with {int(offsets[-1])} but there are {num_values} values; "
            f"the last offset must be the number of values"
        )


def check_bags(
    keys: Sequence[str] | None,
    strides: Sequence[int] | None,
    values: Shaped[Tensor, "..."],
    weights: Shaped[Tensor, "..."] | None,
    lengths: Integer[Tensor, "..."] | None,
    offsets: Integer[Tensor, "..."] | None,
) -> None:
    """Check that lengths, offsets, values and weights describe the same bags.

    Args:
        keys: Names of the keys, in order; None for a tensor without keys.
        strides: Samples per key; None for a tensor without keys.
        values: The values, bag after bag.
        weights: One per value, or None.
        lengths: Values per bag, or None when they are implied by offsets.
        offsets: Start of each bag, or None when they are implied by lengths.

    Raises:
        ValueError: They do not fit together.
    """
    num_bags = lengths.numel() if lengths is not None else _size(offsets) - 1
    bags = _Bags(keys, [num_bags] if strides is None else strides)
    if strides is not None and sum(strides) != num_bags:
        raise ValueError(
            f"{bags.owner}: {len(strides)} keys with {list(strides)} samples need {sum(strides)} "
            f"lengths, got {num_bags}"
        )
    if weights is not None and weights.shape[0] != values.shape[0]:
        raise ValueError(
            f"{bags.owner}: {weights.shape[0]} weights but {values.shape[0]} values; "
            f"there must be one weight per value"
        )
    if offsets is not None and _size(offsets) != num_bags + 1:
        raise ValueError(
            f"{bags.owner}: {num_bags} bags need {num_bags + 1} offsets, got {_size(offsets)}"
        )
    if lengths is not None:
        _check_lengths(bags, lengths.reshape(-1), values.shape[0])
    if offsets is not None:
        _check_offsets(bags, offsets, values.shape[0])
    if lengths is not None and offsets is not None:
        bad = _first(offsets.diff() != lengths.reshape(-1))
        if bad is not None:
            raise ValueError(
                f"{bags.name(bad)}: length {int(lengths.reshape(-1)[bad])} but offsets "
                f"{int(offsets[bad])} to {int(offsets[bad + 1])}; they must agree"
            )


def _size(offsets: Tensor | None) -> int:
    return 0 if offsets is None else offsets.numel()


def check_keys(keys: Sequence[str]) -> None:
    """Check that no key appears twice.

    Raises:
        ValueError: One does.
    """
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"KeyedJaggedTensor: key {key!r} appears twice in {list(keys)}")
        seen.add(key)


def check_inverse(keys: Sequence[str], strides: Sequence[int], inverse: _Inverse) -> None:
    """Check that inverse indices name each key, and samples that the key has.

    Args:
        keys: Keys of the tensor.
        strides: Samples of each key, repeats removed.
        inverse: Keys, in any order, and [keys, full batch] numbers of samples.

    Raises:
        ValueError: They do not.
    """
    inverse_keys, indices = inverse
    if indices.dim() != 2 or indices.shape[0] != len(inverse_keys):
        raise ValueError(
            f"KeyedJaggedTensor: inverse indices for {len(inverse_keys)} keys must have as many "
            f"rows and two dimensions, got {tuple(indices.shape)}"
        )
    for key, stride in zip(keys, strides, strict=True):
        if key not in inverse_keys:
            raise ValueError(
                f"KeyedJaggedTensor, key {key!r}: inverse indices lack it; they have {inverse_keys}"
            )
        row = indices[inverse_keys.index(key)]
        bad = _first((row < 0) | (row >= stride))
        if bad is not None:
            raise ValueError(
                f"KeyedJaggedTensor, key {key!r}, sample {bad}: inverse index {int(row[bad])} is "
                f"not one of its {stride} samples"
            )


def check_ids(
    keys: Sequence[str],
    strides: Sequence[int],
    values: Shaped[Tensor, "..."],
    offsets: Integer[Tensor, "..."],
    tables: Sequence[TableRange],
) -> None:
    """Check that each id is a row of every table that looks its key up.

    Raises:
        ValueError: One is not; names the key, the sample, the id and the table.
    """
    bags = _Bags(keys, strides)
    start = 0
    for key, stride in zip(keys, strides, strict=True):
        end = start + stride
        ids = values[int(offsets[start]) : int(offsets[end])]
        for table in tables:
            if key not in table.feature_names:
                continue
            bad = _first((ids < 0) | (ids >= table.num_embeddings))
            if bad is not None:
                position = int(offsets[start]) + bad
                bag = int(torch.searchsorted(offsets, position, right=True)) - 1
                raise ValueError(
                    f"{bags.name(bag)}: id {int(ids[bad])} is not a row of table {table.name!r}, "
                    f"which has {table.num_embeddings} rows"
                )
        start = end
