"""Values of whole tables that lie in slices on many ranks: what state dicts of sharded models hold.

A `SlicedTensor` has the shape of the whole and the memory of this rank's slices. PyTorch's
distributed checkpoint saves and loads it between any two layouts, by the protocol of checkpointable
objects; `full` gathers it, and `copy_` cuts what is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Shaped
from torch import Tensor

from shardwise.sharding.placement import Placement
from shardwise.sharding.wire import Wire

Sizes = tuple[int, ...]
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A block of a value, [rows] or [rows, columns].

    Attributes:
        offsets: Its first element, per dimension.
        sizes: Its elements, per dimension.
        ranks: Who holds it, ascending; the first speaks for it.
    """

    offsets: Sizes
    sizes: Sizes
    ranks: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """View the block of the whole value."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole


def blocks_of(placement: Placement, *, is_per_row: bool, rest: Sizes = ()) -> list[Block]:
    """List the blocks of a value that lies as a table does.

    Args:
        placement: Where the table lies.
        is_per_row: Whether the value has, for each row, something other than an element per column.
        rest: The sizes of that.
    """
    if not is_per_row:
        return [
            Block(
                (one.rows[0], one.columns[0]),
                (one.rows[1] - one.rows[0], one.columns[1] - one.columns[0]),
                one.ranks,
            )
            for one in placement.slices()
        ]
    cuts = zip(placement.row_cuts[:-1], placement.row_cuts[1:], placement.cells, strict=True)
    return [
        Block(
            (first, *(0 for _ in rest)),
            (last - first, *rest),
            tuple(sorted({rank for cell in row for rank in cell})),
        )
        for first, last, row in cuts
    ]


@dataclass(frozen=True)
class Local:
    """A block that lies here."""

    offsets: Sizes
    value: Tensor


class SlicedTensor(torch.Tensor):
    """A value of a whole table of which this rank holds some blocks.

    It can be saved and loaded, copied into, detached, cloned and gathered; it does not compute.

    Args:
        placement: Where the table lies.
        local: What lies here, at least one block, which may be empty. Row states of a table whose
            columns are cut lie here once for each block of columns.
        wire: Connects the ranks.
        is_per_row: Whether it has, for each row, something other than an element per column.
    """

    placement: Placement
    local: list[Local]
    wire: Wire
    is_per_row: bool

    @staticmethod
    def __new__(
        cls: type["SlicedTensor"],
        placement: Placement,
        local: Sequence[Local],
        wire: Wire,
        is_per_row: bool = False,
    ) -> "SlicedTensor":
        """Describe a value by its blocks."""
        value = local[0].value
        is_per_row = is_per_row or value.dim() != 2
        rest = tuple(value.shape[1:]) if is_per_row else (placement.num_columns,)
        shape = (placement.num_rows, *rest)
        self: SlicedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=value.dtype, device=value.device
        )
        self.placement, self.local, self.wire = placement, list(local), wire
        self.is_per_row = is_per_row
        return self

    def blocks(self) -> list[Block]:
        """List the blocks of the whole value, on all ranks."""
        rest = tuple(self.shape[1:])
        return blocks_of(self.placement, is_per_row=self.is_per_row, rest=rest)

    def full(self) -> Shaped[Tensor, "..."]:
        """Gather the whole value on every rank; each of them must call this."""
        blocks = self.blocks()
        sizes = [0] * self.wire.world_size
        for block in blocks:
            sizes[block.ranks[0]] += torch.Size(block.sizes).numel()
        held = {local.offsets: local.value for local in self.local}
        mine = [b for b in blocks if b.ranks[0] == self.wire.rank]
        empty = self.local[0].value.new_empty(0)
        own = torch.cat([empty, *(held[block.offsets].flatten() for block in mine)])
        tag = f"gather of table {self.placement.table!r}"
        own_sizes = [own.numel()] * self.wire.world_size
        flat = self.wire.all_to_all(
            own.repeat(self.wire.world_size), own_sizes, sizes, tag=tag, lane="answers"
        ).wait()
        whole = empty.new_empty(self.shape)
        pieces = flat.split([torch.Size(b.sizes).numel() for b in _by_sender(blocks)])
        for block, piece in zip(_by_sender(blocks), pieces, strict=True):
            block.of(whole).copy_(piece.view(block.sizes))
        return whole

    def _map(self, function: Any) -> "SlicedTensor":
        local = [Local(one.offsets, function(one.value)) for one in self.local]
        return SlicedTensor(self.placement, local, self.wire, self.is_per_row)

    def _fill(self, source: Tensor) -> "SlicedTensor":
        """Copy from a whole value, or from one that is sliced alike."""
        if source.shape != self.shape:
            raise ValueError(
                f"table {self.placement.table!r}: a value of shape {tuple(self.shape)} cannot be "
                f"copied from one of {tuple(source.shape)}"
            )
        if isinstance(source, SlicedTensor) and source.placement == self.placement:
            for own, other in zip(self.local, source.local, strict=True):
                if own.value.data_ptr() != other.value.data_ptr():
                    own.value.copy_(other.value)
            return self
        whole = source.full() if isinstance(source, SlicedTensor) else source
        for own in self.local:
            own.value.copy_(Block(own.offsets, tuple(own.value.shape), ()).of(whole))
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates it as no classmethod
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the few functions that need no other rank."""
        first = args[0]
        if isinstance(first, SlicedTensor):
            if func is aten.copy_.default:
                return first._fill(args[1])
            if func in (aten.detach.default, aten.alias.default):
                return first._map(torch.Tensor.detach)
            if func is aten.clone.default:
                return first._map(torch.clone)
        raise RuntimeError(
            f"{func} of a value that lies in slices on many ranks (a SlicedTensor of shape "
            f"{[tuple(a.shape) for a in args if isinstance(a, SlicedTensor)]}); gather it with "
            f".full() on every rank first, or take the local slice from named_parameters()"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled: this rank has only its slices."""
        raise TypeError(
            f"a slice of table {self.placement.table!r} cannot be pickled as the table; save with "
            "torch.distributed.checkpoint, or gather with .full() on every rank first"
        )

    def __deepcopy__(self, memo: Any) -> "SlicedTensor":
        """Copy what lies here."""
        return self._map(torch.clone)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # as for dispatch
        """Say what lies here."""
        shapes = [tuple(one.value.shape) for one in self.local]
        return f"SlicedTensor({tuple(self.shape)}, dtype={self.dtype}, here: {shapes})"

    # ---- the protocol of distributed checkpoint, which is imported on use: it takes 0.4 s

    def __create_write_items__(self, name: str, value: Any) -> list[Any]:
        """Describe the blocks that this rank writes: those of which it is the first holder."""
        from torch.distributed.checkpoint import metadata, planner

        properties = metadata.TensorProperties.create_from_tensor(self.local[0].value)
        return [
            planner.WriteItem(
                index=metadata.MetadataIndex(name, torch.Size(block.offsets)),
                type=planner.WriteItemType.SHARD,
                tensor_data=planner.TensorWriteData(
                    chunk=_chunk(block.offsets, block.sizes), properties=properties, size=self.shape
                ),
            )
            for block in self.blocks()
            if block.ranks[0] == self.wire.rank
        ]

    def __create_chunk_list__(self) -> list[Any]:
        """Describe the blocks that this rank reads: all that lie here."""
        return [_chunk(one.offsets, tuple(one.value.shape)) for one in self.local]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Give the memory of a block that lies here."""
        found = [i for i, one in enumerate(self.local) if torch.Size(one.offsets) == index.offset]
        return self.local[index.index if index.index in found else found[0]].value


def _by_sender(blocks: Sequence[Block]) -> list[Block]:
    return sorted(blocks, key=lambda block: block.ranks[0])


def _chunk(offsets: Sizes, sizes: Sizes) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
