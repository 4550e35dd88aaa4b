"""Between keyed jagged tensors and other containers, and comparisons of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.jagged import tree, validation
from shardwise.jagged.jagged_tensor import JaggedTensor
from shardwise.jagged.keyed_jagged_tensor import KeyedJaggedTensor


class ComputeKJTToJTDict(nn.Module):
    """`KeyedJaggedTensor.to_dict` as a module."""

    def forward(self, keyed_jagged_tensor: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Give views of the bags of each key."""
        return keyed_jagged_tensor.to_dict()


class ComputeJTDictToKJT(nn.Module):
    """`KeyedJaggedTensor.from_jt_dict` as a module."""

    def forward(self, jt_dict: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
        """Join one jagged tensor per key."""
        return KeyedJaggedTensor.from_jt_dict(jt_dict)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)


def jt_is_equal(jt_1: JaggedTensor, jt_2: JaggedTensor) -> bool:
    """Say whether bags, values, weights and dtypes are the same."""
    return (
        _equal(jt_1.values(), jt_2.values())
        and _equal(jt_1.weights_or_none(), jt_2.weights_or_none())
        and torch.equal(jt_1.lengths().long(), jt_2.lengths().long())
    )


def kjt_is_equal(kjt_1: KeyedJaggedTensor, kjt_2: KeyedJaggedTensor) -> bool:
    """Say whether both have the same bags under the same keys, in whatever order of keys."""
    if sorted(kjt_1.keys()) != sorted(kjt_2.keys()):
        return False
    left, right = kjt_1.to_dict(), kjt_2.to_dict()
    return all(jt_is_equal(jagged, right[key]) for key, jagged in left.items())


def flatten_kjt_list(
    kjt_arr: Sequence[KeyedJaggedTensor],
) -> tuple[list[Tensor | None], list[Any]]:
    """Give the leaves of all tensors in one list, and the context of each."""
    flat = [tree.flatten_keyed_jagged(kjt) for kjt in kjt_arr]
    return [leaf for leaves, _ in flat for leaf in leaves], [context for _, context in flat]


def unflatten_kjt_list(
    values: Sequence[Tensor | None], contexts: Sequence[Any]
) -> list[KeyedJaggedTensor]:
    """Undo `flatten_kjt_list`.

    Raises:
        ValueError: The number of leaves does not fit the contexts.
    """
    size = tree.NUM_KEYED_JAGGED_LEAVES
    if len(values) != size * len(contexts):
        raise ValueError(
            f"unflatten_kjt_list: {len(contexts)} contexts need {size} leaves each, "
            f"got {len(values)} in all"
        )
    return [
        tree.unflatten_keyed_jagged(values[size * i : size * (i + 1)], context)
        for i, context in enumerate(contexts)
    ]


def validate_keyed_jagged_tensor(
    kjt: KeyedJaggedTensor, configs: Sequence[validation.TableRange] | None = None
) -> bool:
    """Check the tensor, and that its ids are rows of the tables of `configs`.

    Args:
        kjt: What to check.
        configs: Table configs; a table is checked against the keys in its `feature_names`.

    Returns:
        True; everything wrong raises.

    Raises:
        ValueError: Something does not fit; names the key, the sample and the value.
    """
    kjt.validate()
    if configs:
        validation.check_ids(kjt.keys(), kjt.stride_per_key(), kjt.values(), kjt.offsets(), configs)
    return True


def maybe_td_to_kjt(
    features: KeyedJaggedTensor | Mapping[str, Any], keys: Sequence[str] | None = None
) -> KeyedJaggedTensor:
    """Make a keyed jagged tensor of a dict (or TensorDict) of jagged nested tensors.

    Args:
        features: Nested tensors of `torch.jagged` layout by key; a `KeyedJaggedTensor` is given
            back as it is.
        keys: Which keys to take, in order; all of them when None.
    """
    if isinstance(features, KeyedJaggedTensor):
        return features
    names = list(features.keys()) if keys is None else list(keys)
    return KeyedJaggedTensor.from_jt_dict(
        {
            name: JaggedTensor(features[name].values(), offsets=features[name].offsets())
            for name in names
        }
    )
