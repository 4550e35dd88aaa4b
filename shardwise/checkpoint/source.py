"""Reading tensors from files into whatever layout is here.

A `Source` describes tensors as chunks that lie in files, and reads rows of a chunk in bounded
pieces. `fill` reads what a tensor holds on this rank: all of a plain one, the blocks here of a
`SlicedTensor` or `DTensor`. Nobody reads more than the rows that overlap, and no piece is larger
than 4 MiB or one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from shardwise.sharding.sliced import Sizes, SlicedTensor

PIECE_BYTES = 2**22
"""What is read, checked and copied at a time."""


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor that lies in a file as a whole, row after row.

    Attributes:
        offsets: Its first element, per dimension.
        sizes: Its elements, per dimension.
        place: Where it lies, as the source knows it.
    """

    offsets: Sizes
    sizes: Sizes
    place: Any


@dataclass(frozen=True)
class Described:
    """A tensor in files: disjoint chunks that cover it."""

    shape: Sizes
    dtype: torch.dtype
    chunks: Sequence[Chunk]


@runtime_checkable
class Source(Protocol):
    """Tensors in files.

    Attributes:
        name: For messages.
        tensors: What there is, by name.
    """

    name: str
    tensors: Mapping[str, Described]

    def read(self, name: str, chunk: Chunk, rows: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Read rows [first, last) of a chunk, in order.

        A tensor without dimensions has one row.

        Yields:
            The number of the first row, within the chunk, and the rows [n, ...], in memory that the
            next ones may overwrite. They may begin earlier and end later than what was asked for.
        """


@dataclass(frozen=True)
class Here:
    """A block of a tensor that lies on this rank.

    Attributes:
        offsets: Its first element, per dimension.
        value: Its memory.
        is_written: Whether this rank writes it; of replicas one does.
    """

    offsets: Sizes
    value: Tensor
    is_written: bool


def blocks_here(tensor: Shaped[Tensor, "..."], rank: int = 0) -> list[Here]:
    """List the blocks of a tensor that lie on this rank.

    Args:
        tensor: Plain tensors are alike on all ranks, and rank 0 writes them.
        rank: This one.
    """
    if isinstance(tensor, SlicedTensor):
        spoken_for = {b.offsets for b in tensor.blocks() if b.ranks[0] == tensor.wire.rank}
        return [Here(o.offsets, o.value, o.offsets in spoken_for) for o in tensor.local]
    if hasattr(tensor, "device_mesh"):  # DTensor; importing it takes long
        return _blocks_of_dtensor(tensor)
    return [Here((0,) * tensor.dim(), tensor.detach(), rank == 0)]


def _blocks_of_dtensor(tensor: Any) -> list[Here]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(one.is_partial() for one in placements):
        raise ValueError(f"a DTensor {tuple(tensor.shape)} of partial sums cannot be saved")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    at = zip(mesh.get_coordinate(), placements, strict=True)
    is_written = all(place == 0 for place, one in at if one.is_replicate())
    return [Here(tuple(offsets), tensor.to_local().detach(), is_written)]


@torch.no_grad()
def fill(source: Source, name: str, target: Shaped[Tensor, "..."]) -> None:
    """Read a tensor, or what this rank holds of it; its dtype is that of the target.

    Raises:
        ValueError: The files have not all of it, or it is of another shape, or integers were saved
            and floats are here or the reverse.
    """
    described = source.tensors[name]
    check_fit(source, name, target)
    for here in blocks_here(target):
        offsets, value = here.offsets or (0,), here.value if here.value.dim() else here.value[None]
        missing = value.numel()
        for chunk in described.chunks:
            missing -= _fill_from(source, name, chunk, offsets, value)
        if missing:
            raise ValueError(
                f"checkpoint {source.name}: tensor {name!r} lacks {missing} of the elements from "
                f"{list(here.offsets)} on; take another checkpoint"
            )


def check_fit(source: Source, name: str, target: Shaped[Tensor, "..."]) -> None:
    """Check that a tensor can be read into one that is here.

    Raises:
        ValueError: The shapes differ, or the dtypes and they are not both floating.
    """
    saved = source.tensors[name]
    is_converted = saved.dtype.is_floating_point and target.dtype.is_floating_point
    if saved.shape != tuple(target.shape) or not (saved.dtype == target.dtype or is_converted):
        raise ValueError(
            f"checkpoint {source.name}: tensor {name!r} is {list(saved.shape)} {saved.dtype} there "
            f"and {list(target.shape)} {target.dtype} here; use the config and the data it was "
            "saved with"
        )


def _fill_from(source: Source, name: str, chunk: Chunk, offsets: Sizes, value: Tensor) -> int:
    """Copy what a chunk has of a block; give how many elements that is."""
    begins, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
    first = [max(a, b) for a, b in zip(begins, offsets, strict=True)]
    last = [
        min(a + n, b + m) for a, n, b, m in zip(begins, sizes, offsets, value.shape, strict=True)
    ]
    if any(a >= b for a, b in zip(first, last, strict=True)):
        return 0
    inner = range(1, value.dim())
    into = value[first[0] - offsets[0] : last[0] - offsets[0]]
    for dim in inner:
        into = into.narrow(dim, first[dim] - offsets[dim], last[dim] - first[dim])
    asked = first[0] - begins[0], last[0] - begins[0]
    for at, rows in source.read(name, chunk, asked):
        low, high = max(at, asked[0]), min(at + rows.shape[0], asked[1])
        own = rows[low - at : high - at]
        for dim in inner:
            own = own.narrow(dim, first[dim] - begins[dim], last[dim] - first[dim])
        into[low - asked[0] : high - asked[0]].copy_(own)
    return prod(b - a for a, b in zip(first, last, strict=True))
