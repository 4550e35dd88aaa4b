"""`JaggedTensor`: bags of values, one bag per sample."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from shardwise.jagged import dense, display, storage, validation
from shardwise.jagged.bags import Bags
from shardwise.jagged.streamable import Pipelineable


class JaggedTensor(Bags):
    """B bags of values laid end to end, with an optional weight per value.

    Lengths and offsets say the same; the one not given is computed when asked for, and kept.
    Construction checks dtypes only; `validate` checks the rest.

    Args:
        values: The values, bag after bag.
        weights: One per value.
        lengths: Values per bag.
        offsets: Start of each bag, and the number of values at the end.

    Raises:
        ValueError: Neither lengths nor offsets are given.
        TypeError: Lengths or offsets are not integers.
    """

    __slots__ = ()

    @staticmethod
    def empty(
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        values_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        lengths_dtype: torch.dtype = torch.int32,
    ) -> "JaggedTensor":
        """Make a tensor of no bags."""
        return JaggedTensor(
            values=torch.empty(0, dtype=values_dtype, device=device),
            weights=torch.empty(0, dtype=weights_dtype, device=device) if is_weighted else None,
            lengths=torch.empty(0, dtype=lengths_dtype, device=device),
            offsets=torch.zeros(1, dtype=lengths_dtype, device=device),
        )

    @staticmethod
    def empty_like(
        jagged: "JaggedTensor", device: torch.device | str | None = None
    ) -> "JaggedTensor":
        """Allocate the same fields, uninitialised, to be filled with `copy_`."""
        return jagged._map(lambda tensor: torch.empty_like(tensor, device=device))

    @staticmethod
    def from_dense(
        values: list[Shaped[Tensor, "..."]], weights: list[Shaped[Tensor, "..."]] | None = None
    ) -> "JaggedTensor":
        """Join a list of bags; their lengths become int32.

        Args:
            values: One tensor per bag; at least one.
            weights: As `values`, of the same lengths.
        """
        return JaggedTensor(
            values=torch.cat(values),
            weights=None if weights is None else torch.cat(weights),
            lengths=dense.list_lengths(values),
        )

    @staticmethod
    def from_dense_lengths(
        values: Shaped[Tensor, " B N *rest"],
        lengths: Integer[Tensor, " B"],
        weights: Shaped[Tensor, "B N"] | None = None,
    ) -> "JaggedTensor":
        """Keep the first `lengths[b]` values of each row b."""
        return JaggedTensor(
            values=dense.rows_to_bags(values, lengths),
            weights=None if weights is None else dense.rows_to_bags(weights, lengths),
            lengths=lengths,
        )

    def to_dense(self) -> list[Shaped[Tensor, " length *rest"]]:
        """Give one view of the values per bag."""
        return dense.bags_to_list(self._values, self.lengths())

    def to_dense_weights(self) -> list[Shaped[Tensor, " length *rest"]]:
        """Give one view of the weights per bag."""
        return dense.bags_to_list(self.weights(), self.lengths())

    def to_padded_dense(
        self, desired_length: int | None = None, padding_value: float | int = 0.0
    ) -> Shaped[Tensor, " B N *rest"]:
        """Lay the bags in rows of one width; longer bags keep their head.

        Args:
            desired_length: N; the longest bag when None.
            padding_value: What fills the rest of a row.
        """
        return dense.bags_to_rows(
            self._values, self.lengths(), self.offsets(), desired_length, padding_value
        )

    def to_padded_dense_weights(
        self, desired_length: int | None = None, padding_value: float | int = 0.0
    ) -> Shaped[Tensor, " B N *rest"]:
        """Lay the weights in rows, as `to_padded_dense` does the values."""
        return dense.bags_to_rows(
            self.weights(), self.lengths(), self.offsets(), desired_length, padding_value
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "JaggedTensor":
        """Give the same bags on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def copy_(self, source: "JaggedTensor", non_blocking: bool = False) -> "JaggedTensor":
        """Copy the fields of `source`, of equal shapes, into this tensor's memory."""
        storage.copy_fields(self._tensors(), source._tensors_as_in(self), non_blocking)
        return self

    def validate(self) -> None:
        """Check that lengths, offsets, values and weights fit together.

        Raises:
            ValueError: They do not; names the sample and the value.
        """
        validation.check_bags(None, None, self._values, self._weights, self._lengths, self._offsets)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "JaggedTensor":
        values, *others = self._tensors().values()
        assert values is not None, "every tensor has values"
        return JaggedTensor(change(values), *(None if t is None else change(t) for t in others))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by the fields."""
        return JaggedTensor, tuple(self._tensors().values())

    def __repr__(self) -> str:
        """Show sizes, dtypes and the first bags."""
        lengths = self.lengths().reshape(-1)
        bags = display.format_bags(self._values, self._weights, lengths)
        about = display.describe(self._values, self._weights)
        return f"JaggedTensor({lengths.numel()} bags, {about}) {bags}"


Pipelineable.register(JaggedTensor)
