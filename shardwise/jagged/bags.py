"""The fields that jagged tensors share, with and without keys."""

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from shardwise.jagged import storage
from shardwise.jagged.layout import as_integers, lengths_from_offsets
from shardwise.ops.offsets import offsets_from_lengths


class Bags:
    """Bags of values laid end to end, with an optional weight per value.

    Lengths and offsets say the same; the one not given is computed when asked for, and kept.

    Args:
        values: The values, bag after bag.
        weights: One per value.
        lengths: Values per bag.
        offsets: Start of each bag, and the number of values at the end.

    Raises:
        ValueError: Neither lengths nor offsets are given.
        TypeError: Lengths or offsets are not integers.
    """

    __slots__ = ("_lengths", "_offsets", "_values", "_weights")

    def __init__(
        self,
        values: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
        lengths: Shaped[Tensor, "..."] | None = None,
        offsets: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        """Keep the fields; nothing is computed."""
        owner = type(self).__name__
        if lengths is None and offsets is None:
            raise ValueError(f"{owner}: needs lengths or offsets, got neither")
        self._values = values
        self._weights = weights
        self._lengths = as_integers(owner, "lengths", lengths)
        self._offsets = as_integers(owner, "offsets", offsets)

    def device(self) -> torch.device:
        """Say where the values are."""
        return self._values.device

    def values(self) -> Shaped[Tensor, "..."]:
        """Give the values, bag after bag."""
        return self._values

    def weights(self) -> Shaped[Tensor, "..."]:
        """Give the weight of each value.

        Raises:
            ValueError: There are none.
        """
        if self._weights is None:
            raise ValueError(f"{self!r}: it has no weights; construct it with weights=")
        return self._weights

    def weights_or_none(self) -> Shaped[Tensor, "..."] | None:
        """Give the weight of each value, or None."""
        return self._weights

    def lengths(self) -> Integer[Tensor, "..."]:
        """Give the number of values of each bag."""
        if self._lengths is None:
            assert self._offsets is not None, "the constructor takes one of the two"
            self._lengths = lengths_from_offsets(self._offsets)
        return self._lengths

    def lengths_or_none(self) -> Integer[Tensor, "..."] | None:
        """Give the lengths if they were given or computed before."""
        return self._lengths

    def offsets(self) -> Integer[Tensor, "..."]:
        """Give the start of each bag among all values, and their number at the end."""
        if self._offsets is None:
            assert self._lengths is not None, "the constructor takes one of the two"
            self._offsets = offsets_from_lengths(self._lengths)
        return self._offsets

    def offsets_or_none(self) -> Integer[Tensor, "..."] | None:
        """Give the offsets if they were given or computed before."""
        return self._offsets

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work on `stream` is done."""
        storage.record_stream(self._tensors().values(), stream)

    def size_in_bytes(self) -> int:
        """Count the bytes of the fields that are there, computed ones included."""
        return storage.size_in_bytes(self._tensors().values())

    def clear_storage(self) -> None:
        """Free the memory of all fields at once; views of them become unusable."""
        storage.clear_storage(self._tensors().values())

    def _tensors(self) -> dict[str, Tensor | None]:
        return {
            "values": self._values,
            "weights": self._weights,
            "lengths": self._lengths,
            "offsets": self._offsets,
        }

    def _tensors_as_in(self, other: "Bags") -> dict[str, Tensor | None]:
        """Give the tensors, with lengths and offsets where `other` has them."""
        return {
            **self._tensors(),
            "lengths": None if other._lengths is None else self.lengths(),
            "offsets": None if other._offsets is None else self.offsets(),
        }
