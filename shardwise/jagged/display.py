"""How jagged tensors print: their sizes, then the first bags."""

from collections.abc import Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_KEYS = 32
_BAGS = 4
_VALUES = 6


def _has_data(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def _numbers(values: Tensor) -> str:
    shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values[:_VALUES].tolist()]
    return "[" + ", ".join(shown + ["…"] * (values.shape[0] > _VALUES)) + "]"


def format_bags(values: Tensor, weights: Tensor | None, lengths: Tensor) -> str:
    """Write the first bags of a run whose values begin with `values`.

    Never fails on lengths that do not fit the values: it shows what there is.
    """
    if not (_has_data(values) and _has_data(lengths)):
        return "(no data)"
    bags, start = [], 0
    for length in lengths[:_BAGS].tolist():
        bag = slice(start, start + max(length, 0))
        text = _numbers(values[bag])
        bags.append(text if weights is None else f"{text}·{_numbers(weights[bag])}")
        start += max(length, 0)
    return "[" + ", ".join(bags + ["…"] * (lengths.shape[0] > _BAGS)) + "]"


def format_keys(
    keys: Sequence[str],
    strides: Sequence[int],
    values: Tensor,
    weights: Tensor | None,
    lengths: Tensor,
) -> list[str]:
    """Write one line per key with its first bags."""
    lines = []
    for key, stride in zip(keys[:_KEYS], strides, strict=False):
        bags = lengths[:stride]
        lines.append(f"  {key}: {format_bags(values, weights, bags)}")
        lengths = lengths[stride:]
        if _has_data(values) and _has_data(bags):
            count = max(int(bags.sum()), 0)
            values, weights = values[count:], None if weights is None else weights[count:]
    return lines + [f"  … {len(keys) - _KEYS} more"] * (len(keys) > _KEYS)


def describe(values: Tensor, weights: Tensor | None) -> str:
    """Write the dtypes and the device."""
    dtype = str(values.dtype).removeprefix("torch.")
    weighted = "" if weights is None else f", {str(weights.dtype).removeprefix('torch.')} weights"
    return f"{values.shape[0]} values {dtype}{weighted}, {values.device}"
