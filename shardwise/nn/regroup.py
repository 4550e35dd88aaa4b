"""Regroup of pooled features as a module."""

from collections.abc import Sequence

from jaxtyping import Shaped
from torch import Tensor, nn

from shardwise.jagged import KeyedTensor
from shardwise.tables import DataType


class KTRegroupAsDict(nn.Module):
    """Join the blocks of groups of keys, taken from several `KeyedTensor`s, and name the results.

    The tensors' layout is read in each call, so it may change between calls.

    Args:
        groups: Keys of each result, in order; a key may be in several groups, or in none.
        keys: Names of the results.
        emb_dtype: Number format of the results; None keeps that of the tensors.
        multi_device: Whether the tensors may lie on several devices; results lie on the first's.

    Raises:
        ValueError: There are no groups, not as many keys as groups, or two keys are equal.
    """

    def __init__(
        self,
        groups: list[list[str]],
        keys: list[str],
        emb_dtype: DataType | None = None,
        multi_device: bool = False,
    ) -> None:
        """Note the groups."""
        super().__init__()
        if not groups or len(groups) != len(keys) or len(set(keys)) != len(keys):
            raise ValueError(
                f"KTRegroupAsDict: needs as many different keys as groups and at least one, got "
                f"{len(groups)} groups and keys {keys}"
            )
        self._groups = [list(group) for group in groups]
        self._keys = list(keys)
        self._dtype = None if emb_dtype is None else emb_dtype.dtype
        self._multi_device = multi_device

    def forward(self, keyed_tensors: Sequence[KeyedTensor]) -> dict[str, Shaped[Tensor, "..."]]:
        """Regroup.

        Args:
            keyed_tensors: They agree in all but the width. A key that several have is taken from
                the first.

        Returns:
            One contiguous tensor per group, by its name.

        Raises:
            KeyError: No tensor has one of the keys.
            ValueError: There are no tensors, their blocks lie along different dimensions, or they
                lie on different devices without `multi_device`.
        """
        return KeyedTensor.regroup_as_dict(
            [self._convert(keyed, keyed_tensors[0]) for keyed in keyed_tensors],
            self._groups,
            self._keys,
        )

    def _convert(self, keyed: KeyedTensor, first: KeyedTensor) -> KeyedTensor:
        """Give a tensor in the format and on the device of the results."""
        if keyed.device() != first.device():
            if not self._multi_device:
                raise ValueError(
                    f"KTRegroupAsDict: the tensor of {keyed.keys()} lies on {keyed.device()}, that "
                    f"of {first.keys()} on {first.device()}; set multi_device to copy it there"
                )
            keyed = keyed.to(first.device())
        if self._dtype in (None, keyed.values().dtype):
            return keyed
        values = keyed.values().to(self._dtype)
        return KeyedTensor(keyed.keys(), keyed.length_per_key(), values, keyed.key_dim())
