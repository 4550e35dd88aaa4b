"""`KeyedTensor`: one dense tensor whose columns are named blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from shardwise.jagged import storage
from shardwise.jagged.layout import prefix_sums
from shardwise.jagged.streamable import Pipelineable
from shardwise.ops.regroup import Block, regroup


class KeyedTensor:
    """Values of many keys side by side along one dimension.

    Args:
        keys: Their names, in order.
        length_per_key: Width of each key's block.
        values: All blocks.
        key_dim: The dimension that the blocks share.
        offset_per_key: Running totals of the widths, when already known.
        index_per_key: Place of each key, when already known.
    """

    __slots__ = (
        "_index_per_key",
        "_key_dim",
        "_keys",
        "_length_per_key",
        "_offset_per_key",
        "_values",
    )

    def __init__(
        self,
        keys: list[str],
        length_per_key: list[int],
        values: Shaped[Tensor, "..."],
        key_dim: int = 1,
        offset_per_key: list[int] | None = None,
        index_per_key: dict[str, int] | None = None,
    ) -> None:
        """Keep the fields; nothing is computed."""
        self._keys = keys
        self._length_per_key = length_per_key
        self._values = values
        self._key_dim = key_dim
        self._offset_per_key = offset_per_key
        self._index_per_key = index_per_key

    @staticmethod
    def from_tensor_list(
        keys: list[str],
        tensors: list[Shaped[Tensor, "..."]],
        key_dim: int = 1,
        cat_dim: int = 1,
    ) -> "KeyedTensor":
        """Join one tensor per key along `cat_dim`; its sizes along `key_dim` are the widths."""
        widths = [tensor.shape[key_dim] for tensor in tensors]
        return KeyedTensor(keys, widths, torch.cat(tensors, dim=cat_dim), key_dim)

    def keys(self) -> list[str]:
        """Give the names, in order."""
        return self._keys

    def values(self) -> Shaped[Tensor, "..."]:
        """Give all blocks as one tensor."""
        return self._values

    def key_dim(self) -> int:
        """Say along which dimension the blocks lie."""
        return self._key_dim

    def device(self) -> torch.device:
        """Say where the values are."""
        return self._values.device

    def length_per_key(self) -> list[int]:
        """Give the width of each block."""
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Give the start of each block, and the total width at the end."""
        if self._offset_per_key is None:
            self._offset_per_key = prefix_sums(self._length_per_key)
        return self._offset_per_key

    def index_per_key(self) -> dict[str, int]:
        """Give the place of each key."""
        if self._index_per_key is None:
            self._index_per_key = {key: i for i, key in enumerate(self._keys)}
        return self._index_per_key

    def __getitem__(self, key: str) -> Shaped[Tensor, "..."]:
        """Give a view of the block of `key`.

        Raises:
            KeyError: There is no such key; names those there are.
        """
        index = self.index_per_key().get(key)
        if index is None:
            raise KeyError(f"KeyedTensor: no key {key!r}; it has {self._keys}")
        start = self.offset_per_key()[index]
        return self._values.narrow(self._key_dim, start, self._length_per_key[index])

    def to_dict(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Give a view of each block by its key."""
        blocks = torch.split(self._values, self._length_per_key, dim=self._key_dim)
        return dict(zip(self._keys, blocks, strict=True))

    @staticmethod
    def regroup(
        keyed_tensors: Sequence["KeyedTensor"], groups: Sequence[Sequence[str]]
    ) -> list[Shaped[Tensor, "..."]]:
        """Join the blocks of each group of keys, taken from any of the tensors.

        Args:
            keyed_tensors: They agree in all but the width. A key that several have is taken
                from the first.
            groups: Keys of each result, in order; a key may be in several groups, or in none.

        Returns:
            One contiguous tensor per group. In backward the gradients of a key that was used
            more than once are summed.

        Raises:
            KeyError: No tensor has one of the keys.
        """
        return regroup_kts(keyed_tensors, groups)

    @staticmethod
    def regroup_as_dict(
        keyed_tensors: Sequence["KeyedTensor"],
        groups: Sequence[Sequence[str]],
        keys: Sequence[str],
    ) -> dict[str, Shaped[Tensor, "..."]]:
        """Regroup, and name each result after its entry of `keys`.

        Raises:
            ValueError: There are not as many keys as groups.
        """
        if len(groups) != len(keys):
            raise ValueError(f"regroup_as_dict: {len(groups)} groups but {len(keys)} keys")
        return dict(zip(keys, regroup_kts(keyed_tensors, groups), strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "KeyedTensor":
        """Give the same blocks on `device`."""
        return KeyedTensor(
            self._keys,
            self._length_per_key,
            self._values.to(device, non_blocking=non_blocking),
            self._key_dim,
            self._offset_per_key,
            self._index_per_key,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work on `stream` is done."""
        storage.record_stream([self._values], stream)

    def size_in_bytes(self) -> int:
        """Count the bytes of the values."""
        return storage.size_in_bytes([self._values])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by the fields."""
        return KeyedTensor, (self._keys, self._length_per_key, self._values, self._key_dim)

    def __repr__(self) -> str:
        """Show the width of each key, the shape, dtype and device."""
        widths = ", ".join(
            f"{key}: {width}" for key, width in zip(self._keys, self._length_per_key, strict=False)
        )
        dtype = str(self._values.dtype).removeprefix("torch.")
        shape = tuple(self._values.shape)
        return f"KeyedTensor({{{widths}}}, {shape} {dtype}, {self.device()})"


Pipelineable.register(KeyedTensor)


def regroup_kts(
    keyed_tensors: Sequence[KeyedTensor], groups: Sequence[Sequence[str]]
) -> list[Shaped[Tensor, "..."]]:
    """Do what `KeyedTensor.regroup` says.

    Raises:
        KeyError: No tensor has one of the keys; names those there are.
        ValueError: There are no tensors, or their blocks lie along different dimensions.
    """
    dims = {keyed.key_dim() for keyed in keyed_tensors}
    if len(dims) != 1:
        raise ValueError(f"regroup: needs tensors of one key_dim, got {sorted(dims)}")
    owners: dict[str, int] = {}
    for i, keyed in enumerate(keyed_tensors):
        for key in keyed.index_per_key():
            owners.setdefault(key, i)
    for key in (key for group in groups for key in group):
        if key not in owners:
            raise KeyError(f"regroup: no tensor has the key {key!r}; they have {list(owners)}")
    if dims == {1} and all(keyed.values().dim() == 2 for keyed in keyed_tensors):
        blocks = [[_block(keyed_tensors, owners[key], key) for key in group] for group in groups]
        return regroup([keyed.values() for keyed in keyed_tensors], blocks)
    (dim,) = dims
    return [torch.cat([keyed_tensors[owners[key]][key] for key in g], dim) for g in groups]


def _block(keyed_tensors: Sequence[KeyedTensor], owner: int, key: str) -> Block:
    keyed = keyed_tensors[owner]
    index = keyed.index_per_key()[key]
    return owner, keyed.offset_per_key()[index], keyed.length_per_key()[index]
