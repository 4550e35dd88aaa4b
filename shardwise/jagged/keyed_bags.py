"""What the keys of a jagged tensor are: names, samples, values; computed when asked."""

from jaxtyping import Integer
from torch import Tensor

from shardwise.jagged import layout
from shardwise.jagged.bags import Bags

Strides = list[list[int]] | Integer[Tensor, "F W"]
InverseIndices = tuple[list[str], Integer[Tensor, "F B"]]


class KeyedBags(Bags):
    """Bags in key-major order, and what is known on the host of each key.

    `KeyedJaggedTensor` fills the fields and documents them.
    """

    __slots__ = (
        "_index_per_key",
        "_inverse_indices",
        "_keys",
        "_length_per_key",
        "_lengths_offset_per_key",
        "_offset_per_key",
        "_stride",
        "_stride_per_key",
        "_stride_per_key_per_rank",
    )

    _keys: list[str]
    _stride: int | None
    _stride_per_key_per_rank: Strides | None
    _stride_per_key: list[int] | None
    _length_per_key: list[int] | None
    _lengths_offset_per_key: list[int] | None
    _offset_per_key: list[int] | None
    _index_per_key: dict[str, int] | None
    _inverse_indices: InverseIndices | None

    def keys(self) -> list[str]:
        """Give the names of the keys, in order."""
        return self._keys

    def stride(self) -> int:
        """Give the batch size.

        Where keys differ: that of the full batch, when inverse indices tell it, else the largest.
        """
        if self._stride is None:
            if self._inverse_indices is not None and self.variable_stride_per_key():
                self._stride = self._inverse_indices[1].shape[-1]
            elif self.variable_stride_per_key():
                self._stride = max(self.stride_per_key(), default=0)
            else:
                self._stride = self._num_lengths() // len(self._keys) if self._keys else 0
        return self._stride

    def variable_stride_per_key(self) -> bool:
        """Say whether keys may differ in their number of samples."""
        return self._stride_per_key_per_rank is not None

    def stride_per_key_per_rank(self) -> list[list[int]]:
        """Give the samples of each key from each rank; empty where keys do not differ."""
        if isinstance(self._stride_per_key_per_rank, Tensor):
            self._stride_per_key_per_rank = self._stride_per_key_per_rank.tolist()
        return self._stride_per_key_per_rank or []

    def stride_per_key(self) -> list[int]:
        """Give the samples of each key."""
        if self._stride_per_key is None:
            if self.variable_stride_per_key():
                self._stride_per_key = [sum(row) for row in self.stride_per_key_per_rank()]
            else:
                self._stride_per_key = [self.stride()] * len(self._keys)
        return self._stride_per_key

    def inverse_indices(self) -> InverseIndices:
        """Give (keys, [F, full batch]): which sample of a key a sample of the full batch has.

        Raises:
            ValueError: There are none.
        """
        if self._inverse_indices is None:
            raise ValueError(f"KeyedJaggedTensor of keys {self._keys}: it has no inverse indices")
        return self._inverse_indices

    def inverse_indices_or_none(self) -> InverseIndices | None:
        """Give the inverse indices, or None."""
        return self._inverse_indices

    def length_per_key(self) -> list[int]:
        """Give the number of values of each key; may wait for the device."""
        if self._length_per_key is None:
            strides = self.stride_per_key() if self.variable_stride_per_key() else None
            self._length_per_key = layout.values_per_key(self.lengths(), len(self._keys), strides)
        return self._length_per_key

    def length_per_key_or_none(self) -> list[int] | None:
        """Give the number of values of each key if it is known."""
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Give the first value of each key, and the number of values; may wait for the device."""
        if self._offset_per_key is None:
            self._offset_per_key = layout.prefix_sums(self.length_per_key())
        return self._offset_per_key

    def offset_per_key_or_none(self) -> list[int] | None:
        """Give the first value of each key if it is known."""
        return self._offset_per_key

    def lengths_offset_per_key(self) -> list[int]:
        """Give the first length of each key, and the number of lengths."""
        if self._lengths_offset_per_key is None:
            self._lengths_offset_per_key = layout.prefix_sums(self.stride_per_key())
        return self._lengths_offset_per_key

    def index_per_key(self) -> dict[str, int]:
        """Give the place of each key."""
        if self._index_per_key is None:
            self._index_per_key = {key: i for i, key in enumerate(self._keys)}
        return self._index_per_key

    def _num_lengths(self) -> int:
        if self._lengths is not None:
            return self._lengths.numel()
        return max(self.offsets().numel() - 1, 0)
