"""`KeyedJaggedTensor`: the sparse input of a model, bags of ids for each key and sample.

The layout is key-major: all bags of the first key, then all of the second. What follows from the
tensors (batch size, offsets, counts per key) is computed when first asked for, and kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from shardwise.jagged import display, exchange, layout, storage, validation
from shardwise.jagged.jagged_tensor import JaggedTensor
from shardwise.jagged.join import join_inverse_indices, join_length_per_key, join_weights
from shardwise.jagged.keyed_bags import InverseIndices, KeyedBags, Strides
from shardwise.jagged.streamable import Pipelineable
from shardwise.ops.permute import permute_segments


class KeyedJaggedTensor(KeyedBags):
    """Bags of values for F keys, each over B samples, with an optional weight per value.

    Keys may differ in their number of samples (`stride_per_key_per_rank` is given then); the
    inverse indices say which of a key's samples each sample of the full batch shares.
    Construction checks dtypes only; `validate` checks the rest.

    Args:
        keys: Names of the keys.
        values: The values: key after key, in each sample after sample.
        weights: One per value.
        lengths: Values per bag; [F·B] or [F, B].
        offsets: Start of each bag among all values, and their number at the end.
        stride: B, when already known.
        stride_per_key_per_rank: Samples of each key that came from each rank (of input that was
            not exchanged: one rank).
        stride_per_key: Samples of each key, when already known.
        length_per_key: Values of each key, when already known.
        lengths_offset_per_key: First length of each key, when already known.
        offset_per_key: First value of each key, when already known.
        index_per_key: Place of each key, when already known.
        jt_dict: What `to_dict` gives, when already known.
        inverse_indices: Keys in any order, and for each a row that maps the samples of the full
            batch to the samples of that key.

    Raises:
        ValueError: Neither lengths nor offsets are given.
        TypeError: Lengths or offsets are not integers.
    """

    __slots__ = ("_jt_dict",)

    def __init__(  # noqa: PLR0913  # the parameters of the field's vocabulary
        self,
        keys: list[str],
        values: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
        lengths: Shaped[Tensor, "..."] | None = None,
        offsets: Shaped[Tensor, "..."] | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: Strides | None = None,
        stride_per_key: list[int] | None = None,
        length_per_key: list[int] | None = None,
        lengths_offset_per_key: list[int] | None = None,
        offset_per_key: list[int] | None = None,
        index_per_key: dict[str, int] | None = None,
        jt_dict: dict[str, JaggedTensor] | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> None:
        """Keep the fields; nothing is computed."""
        super().__init__(values, weights, lengths, offsets)
        self._keys = keys
        self._stride = stride
        self._stride_per_key_per_rank = stride_per_key_per_rank
        self._stride_per_key = stride_per_key
        self._length_per_key = length_per_key
        self._lengths_offset_per_key = lengths_offset_per_key
        self._offset_per_key = offset_per_key
        self._index_per_key = index_per_key
        self._jt_dict = jt_dict
        self._inverse_indices = inverse_indices

    @staticmethod
    def from_lengths_sync(  # the parameters of the field's vocabulary
        keys: list[str],
        values: Shaped[Tensor, "..."],
        lengths: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: Strides | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> "KeyedJaggedTensor":
        """Construct from lengths, then `sync`."""
        return KeyedJaggedTensor(
            keys=keys,
            values=values,
            weights=weights,
            lengths=lengths,
            stride=stride,
            stride_per_key_per_rank=stride_per_key_per_rank,
            inverse_indices=inverse_indices,
        ).sync()

    @staticmethod
    def from_offsets_sync(  # the parameters of the field's vocabulary
        keys: list[str],
        values: Shaped[Tensor, "..."],
        offsets: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: Strides | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> "KeyedJaggedTensor":
        """Construct from offsets, then `sync`."""
        return KeyedJaggedTensor(
            keys=keys,
            values=values,
            weights=weights,
            offsets=offsets,
            stride=stride,
            stride_per_key_per_rank=stride_per_key_per_rank,
            inverse_indices=inverse_indices,
        ).sync()

    @staticmethod
    def from_jt_dict(jt_dict: dict[str, JaggedTensor]) -> "KeyedJaggedTensor":
        """Join one jagged tensor per key; where they differ in their samples, strides vary.

        Raises:
            ValueError: The dict is empty, or only some of its tensors are weighted.
        """
        if not jt_dict:
            raise ValueError("from_jt_dict: needs at least one key, got none")
        parts = list(jt_dict.values())
        lengths = [part.lengths() for part in parts]
        strides = [part.numel() for part in lengths]
        is_variable = any(stride != strides[0] for stride in strides)
        return KeyedJaggedTensor(
            keys=list(jt_dict),
            values=torch.cat([part.values() for part in parts]),
            weights=join_weights(list(jt_dict), [part.weights_or_none() for part in parts]),
            lengths=torch.cat(lengths),
            stride=None if is_variable else strides[0],
            stride_per_key_per_rank=[[stride] for stride in strides] if is_variable else None,
        )

    @staticmethod
    def concat(kjt_list: list["KeyedJaggedTensor"]) -> "KeyedJaggedTensor":
        """Append the keys of several tensors.

        Raises:
            ValueError: The list is empty, or the tensors differ in whether they have weights,
                variable strides or inverse indices, or in their batch.
        """
        if not kjt_list:
            raise ValueError("concat: needs at least one KeyedJaggedTensor, got none")
        first = kjt_list[0]
        is_variable = first.variable_stride_per_key()
        if any(kjt.variable_stride_per_key() != is_variable for kjt in kjt_list):
            raise ValueError("concat: some tensors have variable strides and some have not")
        strides = [kjt.stride() for kjt in kjt_list]
        if not is_variable and any(stride != strides[0] for stride in strides):
            raise ValueError(f"concat: the tensors must have one batch size, got {strides}")
        return KeyedJaggedTensor(
            keys=[key for kjt in kjt_list for key in kjt._keys],
            values=torch.cat([kjt.values() for kjt in kjt_list]),
            weights=join_weights(
                [kjt._keys for kjt in kjt_list], [kjt.weights_or_none() for kjt in kjt_list]
            ),
            lengths=torch.cat([kjt.lengths().reshape(-1) for kjt in kjt_list]),
            stride=None if is_variable else first.stride(),
            stride_per_key_per_rank=(
                [row for kjt in kjt_list for row in kjt.stride_per_key_per_rank()]
                if is_variable
                else None
            ),
            length_per_key=join_length_per_key([kjt.length_per_key_or_none() for kjt in kjt_list]),
            inverse_indices=join_inverse_indices(
                [kjt.inverse_indices_or_none() for kjt in kjt_list]
            ),
        )

    @staticmethod
    def empty(
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        values_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        lengths_dtype: torch.dtype = torch.int32,
    ) -> "KeyedJaggedTensor":
        """Make a tensor of no keys."""
        return KeyedJaggedTensor(
            keys=[],
            values=torch.empty(0, dtype=values_dtype, device=device),
            weights=torch.empty(0, dtype=weights_dtype, device=device) if is_weighted else None,
            lengths=torch.empty(0, dtype=lengths_dtype, device=device),
            stride=0,
        )

    @staticmethod
    def empty_like(
        kjt: "KeyedJaggedTensor", device: torch.device | str | None = None
    ) -> "KeyedJaggedTensor":
        """Make a tensor of no keys, of the dtypes and the batch size of `kjt`."""
        weights = kjt.weights_or_none()
        device = kjt.device() if device is None else device
        return KeyedJaggedTensor(
            keys=[],
            values=torch.empty(0, dtype=kjt.values().dtype, device=device),
            weights=None if weights is None else weights.new_empty(0, device=device),
            lengths=torch.empty(0, dtype=kjt.lengths().dtype, device=device),
            stride=kjt.stride(),
            stride_per_key_per_rank=[] if kjt.variable_stride_per_key() else None,
        )

    def sync(self) -> "KeyedJaggedTensor":
        """Compute the counts per key; on an accelerator this waits for the device."""
        self.offset_per_key()
        return self

    def unsync(self) -> "KeyedJaggedTensor":
        """Forget the counts per key, and what was made from them."""
        self._length_per_key = None
        self._offset_per_key = None
        self._jt_dict = None
        return self

    def flatten_lengths(self) -> "KeyedJaggedTensor":
        """Give the same tensor with its lengths in one dimension."""
        flat = self._map(lambda tensor: tensor)
        flat._lengths = self.lengths().reshape(-1)
        return flat

    def split(self, segments: list[int]) -> list["KeyedJaggedTensor"]:
        """Cut into runs of `segments[i]` consecutive keys: views, nothing is copied.

        Raises:
            ValueError: The segments do not add up to the number of keys.
        """
        if sum(segments) != len(self._keys):
            raise ValueError(
                f"split: segments {segments} must add up to the {len(self._keys)} keys "
                f"{self._keys}, they add up to {sum(segments)}"
            )
        ends = layout.prefix_sums(segments)
        return [
            self._with_keys(list(range(ends[i], ends[i + 1])), *fields)
            for i, fields in enumerate(self._cut(segments))
        ]

    def permute(
        self, indices: list[int], indices_tensor: Integer[Tensor, "..."] | None = None
    ) -> "KeyedJaggedTensor":
        """Copy keys into another order; they may repeat and be left out.

        Inverse indices are kept: they find their key by name. Differentiable in the weights.

        Args:
            indices: Places of the keys to copy.
            indices_tensor: The same; not read, the list is all that is needed.

        Raises:
            IndexError: There is no such place.
        """
        unknown = [i for i in indices if not 0 <= i < len(self._keys)]
        if unknown:
            raise IndexError(
                f"permute: {unknown[0]} is not a place of one of the {len(self._keys)} keys "
                f"{self._keys}"
            )
        is_permutation = sorted(indices) == list(range(len(self._keys)))
        lengths, values, weights = permute_segments(
            self.lengths().reshape(-1),
            self._values,
            self._weights,
            indices,
            self.stride_per_key(),
            self._length_per_key if is_permutation else self.length_per_key(),
        )
        return self._with_keys(indices, values, weights, lengths)

    def __getitem__(self, key: str) -> JaggedTensor:
        """Give views of the bags of `key`; may wait for the device.

        Raises:
            KeyError: There is no such key; names those there are.
        """
        if self._jt_dict is not None and key in self._jt_dict:
            return self._jt_dict[key]
        index = self.index_per_key().get(key)
        if index is None:
            raise KeyError(f"KeyedJaggedTensor: no key {key!r}; it has {self._keys}")
        start, size = self.offset_per_key()[index], self.length_per_key()[index]
        bags = self.lengths_offset_per_key()[index], self.stride_per_key()[index]
        return JaggedTensor(
            self._values.narrow(0, start, size),
            None if self._weights is None else self._weights.narrow(0, start, size),
            self.lengths().reshape(-1).narrow(0, *bags),
        )

    def to_dict(self) -> dict[str, JaggedTensor]:
        """Give views of the bags of each key, and keep them; may wait for the device."""
        if self._jt_dict is None:
            cut = self._cut([1] * len(self._keys))
            self._jt_dict = {
                key: JaggedTensor(*fields) for key, fields in zip(self._keys, cut, strict=True)
            }
        return self._jt_dict

    def to(
        self,
        device: torch.device | str,
        non_blocking: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "KeyedJaggedTensor":
        """Give the same tensor on `device`, its weights as `dtype`."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if dtype is not None and moved._weights is not None:
            moved._weights = moved._weights.to(dtype)
        return moved

    def pin_memory(self) -> "KeyedJaggedTensor":
        """Give the same tensor in page-locked memory, from where copies can be asynchronous."""
        return self._map(lambda tensor: tensor.pin_memory())

    def copy_(self, source: "KeyedJaggedTensor", non_blocking: bool = False) -> "KeyedJaggedTensor":
        """Copy the fields of `source`, of equal keys and shapes, into this tensor's memory.

        Raises:
            ValueError: Keys, fields or shapes differ; nothing was copied.
        """
        if self._keys != source._keys:
            raise ValueError(f"copy_: keys {self._keys} here, {source._keys} in the source")
        storage.copy_fields(self._tensors(), source._tensors_as_in(self), non_blocking)
        self._stride_per_key_per_rank = source._stride_per_key_per_rank
        self._stride_per_key = source._stride_per_key
        self._lengths_offset_per_key = source._lengths_offset_per_key
        return self.unsync()

    def validate(self) -> None:
        """Check that keys, lengths, offsets, values, weights and inverse indices fit together.

        Raises:
            ValueError: They do not; names the key, the sample and the value.
        """
        validation.check_keys(self._keys)
        strides = self.stride_per_key()
        validation.check_bags(
            self._keys, strides, self._values, self._weights, self._lengths, self._offsets
        )
        if self._inverse_indices is not None:
            validation.check_inverse(self._keys, strides, self._inverse_indices)

    def dist_labels(self) -> list[str]:
        """Name the tensors that an input exchange sends, in order."""
        return exchange.labels(self.variable_stride_per_key(), self._weights is not None)

    def dist_splits(self, key_splits: list[int]) -> list[list[int]]:
        """Count, for each of those tensors, the elements that go to each destination.

        Args:
            key_splits: Consecutive keys per destination.
        """
        return exchange.splits(
            key_splits,
            self.stride_per_key(),
            self.length_per_key(),
            self.variable_stride_per_key(),
            self._weights is not None,
        )

    def dist_tensors(self) -> list[Tensor]:
        """Give the tensors that an input exchange sends."""
        tensors = [self.lengths().reshape(-1), self._values]
        if self.variable_stride_per_key():
            tensors.append(torch.tensor(self.stride_per_key(), device=self.device()))
        return tensors if self._weights is None else [*tensors, self._weights]

    @staticmethod
    def dist_init(
        keys: list[str],
        tensors: list[Tensor],
        variable_stride_per_key: bool,
        num_workers: int,
        recat: Integer[Tensor, "..."] | None = None,
        stride_per_rank: list[int] | None = None,
        stagger: int = 1,
    ) -> "KeyedJaggedTensor":
        """Make a tensor of what arrived from all ranks; see `exchange.receive`."""
        received = exchange.receive(
            len(keys),
            tensors,
            variable_stride_per_key,
            num_workers,
            recat,
            stride_per_rank,
            stagger,
        )
        return KeyedJaggedTensor(
            keys=keys,
            values=received.values,
            weights=received.weights,
            lengths=received.lengths,
            stride=received.stride,
            stride_per_key_per_rank=received.stride_per_key_per_rank,
        ).sync()

    def _with_keys(
        self, indices: list[int], values: Tensor, weights: Tensor | None, lengths: Tensor
    ) -> "KeyedJaggedTensor":
        """Make a tensor of some of the keys, from the fields that belong to them."""
        strides, counts = None, self._length_per_key
        if self.variable_stride_per_key():
            rows = self.stride_per_key_per_rank()
            strides = [rows[i] for i in indices]
        return KeyedJaggedTensor(
            keys=[self._keys[i] for i in indices],
            values=values,
            weights=weights,
            lengths=lengths,
            stride=None if strides is not None else self.stride(),
            stride_per_key_per_rank=strides,
            length_per_key=None if counts is None else [counts[i] for i in indices],
            inverse_indices=self._inverse_indices,
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        inverse = None if self._inverse_indices is None else self._inverse_indices[1]
        return {**super()._tensors(), "inverse indices": inverse}

    def _cut(self, segments: list[int]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Give views of values, weights and lengths of runs of consecutive keys."""
        sizes = layout.segment_sums(self.length_per_key(), segments)
        bags = layout.segment_sums(self.stride_per_key(), segments)
        values = torch.split(self._values, sizes)
        lengths = torch.split(self.lengths().reshape(-1), bags)
        if self._weights is None:
            return [(v, None, n) for v, n in zip(values, lengths, strict=True)]
        return list(zip(values, torch.split(self._weights, sizes), lengths, strict=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "KeyedJaggedTensor":
        """Change each tensor, and keep what was computed on the host."""
        arguments = list(self._arguments())
        for i in range(1, 5):
            arguments[i] = None if arguments[i] is None else change(arguments[i])
        if self._inverse_indices is not None:
            arguments[-1] = (self._inverse_indices[0], change(self._inverse_indices[1]))
        return KeyedJaggedTensor(*arguments)

    def _arguments(self) -> tuple[Any, ...]:
        """Give the constructor's arguments, without views that were made of them."""
        return (
            self._keys,
            self._values,
            self._weights,
            self._lengths,
            self._offsets,
            self._stride,
            self._stride_per_key_per_rank,
            self._stride_per_key,
            self._length_per_key,
            self._lengths_offset_per_key,
            self._offset_per_key,
            self._index_per_key,
            None,
            self._inverse_indices,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy without the views that were made of the fields."""
        return KeyedJaggedTensor, self._arguments()

    def __repr__(self) -> str:
        """Show sizes, dtypes and the first bags of each key."""
        about = display.describe(self._values, self._weights)
        lines = [f"KeyedJaggedTensor({len(self._keys)} keys, {self.stride()} samples, {about})"]
        lengths = self.lengths().reshape(-1)
        shown = display.format_keys(
            self._keys, self.stride_per_key(), self._values, self._weights, lengths
        )
        return "\n".join(lines + shown)


Pipelineable.register(KeyedJaggedTensor)
