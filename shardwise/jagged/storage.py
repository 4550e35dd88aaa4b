"""Memory of the tensors that a jagged or keyed tensor holds, whichever class it is."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Leave out the fields that are absent."""
    return [tensor for tensor in tensors if tensor is not None]


def size_in_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Count the bytes of the elements; a cached tensor counts, memory behind a view does not."""
    return sum(tensor.numel() * tensor.element_size() for tensor in present(tensors))


def clear_storage(tensors: Iterable[Tensor | None]) -> None:
    """Free the memory at once; every view of it becomes unusable."""
    for tensor in present(tensors):
        tensor.untyped_storage().resize_(0)


def record_stream(tensors: Iterable[Tensor | None], stream: torch.Stream) -> None:
    """Keep the memory from being reused before the work on `stream` is done."""
    for tensor in present(tensors):
        tensor.record_stream(stream)


def copy_fields(
    targets: Mapping[str, Tensor | None],
    sources: Mapping[str, Tensor | None],
    non_blocking: bool,
) -> None:
    """Copy each source into the target of its name, in place.

    Raises:
        ValueError: A field is present on one side only, or the shapes differ; nothing was copied.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, target in targets.items():
        source = sources[name]
        if target is None and source is None:
            continue
        if target is None or source is None or target.shape != source.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (target, source)]
            raise ValueError(f"copy_: {name} has shape {shapes[0]} here, {shapes[1]} in the source")
        pairs.append((target, source))
    for target, source in pairs:
        target.copy_(source, non_blocking=non_blocking)
