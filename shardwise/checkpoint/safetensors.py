"""Consolidated files of a model, sharded or not, in the safetensors format that other tools read.

Each rank writes its blocks at their places in files that all ranks see, and reads no more than its
blocks: no rank holds a whole large table and no weight is sent. Columns of one row that lie on
several ranks are written through mapped memory, so ranks on several hosts then need a file system
that keeps such writes apart by the byte (a parallel one; not NFS).
"""

import json
import mmap
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from shardwise.checkpoint.holders import mark_changed, tensors_of, together, wire_of
from shardwise.checkpoint.restore import as_patterns, is_named
from shardwise.checkpoint.source import (
    PIECE_BYTES,
    Chunk,
    Described,
    Here,
    blocks_here,
    check_fit,
    fill,
)
from shardwise.checkpoint.tensor_file import (
    Entry,
    Layout,
    TensorFile,
    lay_out,
    map_tensor,
    num_bytes,
)
from shardwise.sharding.sliced import Block

_INDEX = "model.safetensors.index.json"


class Unmatched(NamedTuple):
    """What a load that was not strict left alone.

    Attributes:
        missing: Names that the model has and the files have not.
        unexpected: Names that the files have and the model has not.
    """

    missing: list[str]
    unexpected: list[str]


def export_safetensors(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write whole tables and all other state of a model as one file, or as several with an index.

    Nothing is at `path` before all is written, and a file that was there stays until then. If the
    state lies on several ranks each of them calls this, with a path that all of them see; if none
    of it is sharded, whoever calls writes all.

    Args:
        model_or_state: A model, or tensors by name: those of a sharded state dict are whole.
        path: The file; with `max_shard_bytes` a folder that does not exist yet.
        max_shard_bytes: Begin another file before one would get larger; a larger tensor has a file
            of its own. The folder then holds `model-00001-of-00002.safetensors` and so on, and
            `model.safetensors.index.json`, which says what lies where.
        metadata: Texts to keep with the tensors; `format` is "pt" unless given.

    Raises:
        FileExistsError: The folder is there already.
        OSError: The disk is full, for one; nothing is left behind.
        TypeError: The state holds something that is no tensor, or the metadata no text.
        ValueError: A dtype has no name in the format.
    """
    state = tensors_of(model_or_state)
    texts = {"format": "pt", **(metadata or {})}
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise TypeError(f"metadata of {path}: keys and values must be texts, got {texts}")
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    if max_shard_bytes is None:
        layouts = {unfinished: lay_out(state, texts)}
    else:
        layouts = _lay_out_several(unfinished, state, max_shard_bytes, texts)
    wire = wire_of(state)
    rank = 0 if wire is None else wire.rank
    try:
        with together(wire, f"preparing {path.name}"):
            if rank == 0:
                _prepare(path, unfinished, layouts, is_folder=max_shard_bytes is not None)
        with together(wire, f"writing {path.name}"):
            for file, layout in layouts.items():
                _write(file, layout, state, rank)
        with together(wire, f"finishing {path.name}"):
            if rank == 0:
                _finish(path, unfinished, layouts)
    except BaseException:
        if rank == 0:
            _remove(unfinished)
        raise


def load_safetensors(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    only: str | Sequence[str] | None = None,
    strict: bool = True,
) -> Unmatched:
    """Copy the tensors of a file, or of several with an index, into a model, sharded or not.

    A rank reads the rows of its slices; if the model is sharded, every rank calls this. All is
    checked before anything changes. Floats of another dtype are converted as PyTorch does: rounded
    to the nearest, ties to even, and to infinity beyond the range. Integers and booleans must have
    the dtype of the file.

    Args:
        path: A safetensors file, an index, or a folder with either.
        model: A model, or tensors by name; copied into.
        only: Names of tensors to load, their beginnings up to a dot, or patterns; None: all.
        strict: Whether the names of both sides, among those of `only`, must be the same.

    Returns:
        The names that only one side has: none if strict.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or does not fit the model; says which, and why.
    """
    wanted = tensors_of(model)
    with together(wire_of(wanted), f"loading {Path(path).name}"):
        files = _Files(Path(path))
        chosen = _choose(wanted.keys() | files.tensors.keys(), only, path)
        missing = [name for name in wanted if name in chosen - files.tensors.keys()]
        unexpected = [name for name in files.tensors if name in chosen - wanted.keys()]
        if strict and (missing or unexpected):
            raise ValueError(
                f"{path}: it lacks {missing} and has {unexpected} too many; give only=… or "
                "strict=False"
            )
        names = [name for name in wanted if name in chosen & files.tensors.keys()]
        for name in names:
            check_fit(files, name, wanted[name])
        for name in names:
            fill(files, name, wanted[name])
        mark_changed(model)
    return Unmatched(missing, unexpected)


# ---- writing


def _lay_out_several(
    folder: Path, state: Mapping[str, Tensor], max_bytes: int, metadata: Mapping[str, str]
) -> dict[Path, Layout]:
    if max_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_bytes}")
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if groups[-1] and sum(map(num_bytes, groups[-1].values())) + num_bytes(tensor) > max_bytes:
            groups.append({})
        groups[-1][name] = tensor
    return {
        folder / f"model-{i:05}-of-{len(groups):05}.safetensors": lay_out(group, metadata)
        for i, group in enumerate(groups, 1)
    }


def _prepare(
    path: Path, unfinished: Path, layouts: Mapping[Path, Layout], *, is_folder: bool
) -> None:
    """Make the files with their headers and all their space, so that no later write lacks it."""
    if is_folder and path.exists():
        raise FileExistsError(f"{path} is there already; name another folder, or remove it first")
    _remove(unfinished)
    (unfinished if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
    for name, layout in layouts.items():
        with name.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, layout.num_bytes)
                file.truncate(layout.num_bytes)
            except OSError as error:
                why = f"no room for its {layout.num_bytes} bytes ({error.strerror})"
                raise OSError(error.errno, why, str(path)) from error
            file.write(layout.header)


def _write(path: Path, layout: Layout, state: Mapping[str, Tensor], rank: int) -> None:
    """Write the blocks that are this rank's to write."""
    with path.open("r+b") as file:
        for name, entry in layout.entries.items():
            for here in blocks_here(state[name], rank):
                if here.is_written and here.value.numel():
                    _put(file, entry, here)
        file.flush()
        os.fsync(file.fileno())


def _put(file: BinaryIO, entry: Entry, here: Here) -> None:
    value = here.value.detach()
    offsets = here.offsets or (0,)
    rows = value if value.dim() else value[None]
    row_bytes = value[:1].numel() * value.element_size() if value.dim() else value.element_size()
    step = max(1, PIECE_BYTES // row_bytes)
    if rows.shape[1:] == entry.shape[1:]:
        file.seek(entry.start + offsets[0] * row_bytes)
        for piece in rows.split(step):
            whole = piece.contiguous().cpu().flatten().view(torch.uint8)
            file.write(whole.numpy().data)
        return
    file.flush()
    with mmap.mmap(file.fileno(), 0) as memory:
        into = Block(offsets, tuple(rows.shape), ()).of(map_tensor(memory, entry))
        for to, piece in zip(into.split(step), rows.split(step), strict=True):
            to.copy_(piece)
        memory.flush()
        del into, to  # views of what is closed now


def _finish(path: Path, unfinished: Path, layouts: Mapping[Path, Layout]) -> None:
    if unfinished.is_dir():
        weight_map = {
            name: file.name for file, layout in layouts.items() for name in layout.entries
        }
        sizes = [e.stop - e.start for layout in layouts.values() for e in layout.entries.values()]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (unfinished / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- reading


class _Files:
    """Safetensors files as a source of tensors."""

    def __init__(self, path: Path) -> None:
        """Open the file of each tensor."""
        self.name = str(path)
        self.tensors: Mapping[str, Described] = {
            name: _describe(file, name) for name, file in _open(path).items()
        }

    def read(self, name: str, chunk: Chunk, rows: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """View rows of a tensor, piece by piece."""
        whole = chunk.place.read(name)
        whole = whole if whole.dim() else whole[None]
        step = max(1, PIECE_BYTES // max(1, whole[:1].numel() * whole.element_size()))
        for first in range(rows[0], rows[1], step):
            yield first, whole[first : min(first + step, rows[1])]


def _describe(file: TensorFile, name: str) -> Described:
    entry = file.entries[name]
    return Described(entry.shape, entry.dtype, [Chunk((0,) * len(entry.shape), entry.shape, file)])


def _open(path: Path) -> dict[str, TensorFile]:
    """Give the file of each tensor."""
    if path.is_dir():
        index, single = path / _INDEX, path / "model.safetensors"
        if not index.is_file() and not single.is_file():
            raise FileNotFoundError(f"{path}: there is neither {_INDEX} nor {single.name} in it")
        path = index if index.is_file() else single
    if path.suffix != ".json":
        file = TensorFile(path)
        return dict.fromkeys(file.entries, file)
    places = _read_index(path)
    files = {name: TensorFile(path.parent / name) for name in dict.fromkeys(places.values())}
    for name, place in places.items():
        if name not in files[place].entries:
            raise ValueError(f"index {path}: tensor {name!r} is not in {place}, which it names")
    return {name: files[place] for name, place in places.items()}


def _read_index(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"index {path}: there is no such file")
    try:
        places: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"index {path}: it is damaged ({type(error).__name__}: {error})"
        ) from error
    for name, place in places.items():
        if not isinstance(place, str) or Path(place).name != place:
            raise ValueError(f"index {path}: tensor {name!r} is in {place!r}, no file beside it")
    return places


def _choose(names: Collection[str], only: str | Sequence[str] | None, path: str | Path) -> set[str]:
    patterns = as_patterns(only)
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if is_named(name, pattern)}
        if not found:
            raise ValueError(f"{path}: only={pattern!r} is neither in it nor in the model")
        chosen |= found
    return chosen
