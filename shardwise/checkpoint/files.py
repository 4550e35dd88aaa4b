"""A checkpoint's files: each rank writes one, the first one the manifest, and any rank reads.

The manifest is JSON: the state without its tensors, the size of every file, and of every tensor the
shape, dtype and chunks, with a checksum for each piece of 4 MiB. Its first line has the checksum of
the rest. So what is damaged is found where it is read, and nothing in a checkpoint is ever run.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.checkpoint.folder import MANIFEST, sync
from shardwise.checkpoint.record import describe, piece_rows, write_tensor
from shardwise.checkpoint.source import Chunk, Described
from shardwise.checkpoint.state import merge
from shardwise.sharding.sliced import Sizes

FORMAT = "shardwise checkpoint 1"
_METADATA = ".metadata"


@dataclass(frozen=True)
class Block:
    """A block of a tensor that this rank writes."""

    name: str
    shape: Sizes
    offsets: Sizes
    value: Tensor


@dataclass(frozen=True)
class Place:
    """Where a chunk lies: its file, its first byte, its checksums up to the end of each piece."""

    file: str
    begin: int
    crcs: list[int]


def write_part(folder: Path, rank: int, blocks: Iterable[Block], tree: Any) -> None:
    """Write the blocks of a rank to its file, and a description of them for the first rank."""
    name, described = f"__{rank}_0.distcp", []
    with (folder / name).open("wb", buffering=0) as file:
        for block in blocks:
            offsets, sizes = list(block.offsets), list(block.value.shape)
            begin, start, end, crcs = 0, 0, 0, list[int]()
            if block.value.numel():
                begin, start, end, crcs = write_tensor(file, block.value)
            dtype = str(block.value.dtype).removeprefix("torch.")
            shape = list(block.shape)
            chunk = [offsets, sizes, name, start, crcs]
            described.append([block.name, dtype, shape, chunk, [begin, end]])
        size = file.tell()
    sync(folder / name)
    part = {"tree": tree, "file": [name, size], "blocks": described}
    (folder / _part(rank)).write_text(json.dumps(part), encoding="utf-8")


def _part(rank: int) -> str:
    return f"part_{rank}.json"


def write_manifest(folder: Path, num_ranks: int, step: int) -> None:
    """Join the descriptions of all ranks; write the manifest, and what torch's own reader wants.

    Raises:
        ValueError: Ranks have a tensor in different shapes.
    """
    parts = [json.loads((folder / _part(rank)).read_text("utf-8")) for rank in range(num_ranks)]
    tree = parts[0]["tree"]
    tensors: dict[str, dict[str, Any]] = {}
    frames: dict[tuple[str, Any], tuple[str, int, int]] = {}
    for part in parts:
        tree = merge(tree, part["tree"])
        for name, dtype, shape, chunk, frame in part["blocks"]:
            one = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "chunks": []})
            if (one["dtype"], one["shape"]) != (dtype, shape):
                raise ValueError(
                    f"checkpoint: tensor {name!r} is {shape} {dtype} on one rank and "
                    f"{one['shape']} {one['dtype']} on another; mark it PerRank"
                )
            at = name, tuple(chunk[0])
            if frame[1] and at not in frames:  # groups of replicas write the same blocks
                frames[at] = (chunk[2], *frame)
                one["chunks"].append(chunk)
    metadata = describe({name: _described(one) for name, one in tensors.items()}, frames)
    (folder / _METADATA).write_bytes(metadata)
    files = dict(part["file"] for part in parts) | {_METADATA: len(metadata)}
    body = json.dumps({"step": step, "state": tree, "files": files, "tensors": tensors}).encode()
    head = json.dumps({"format": FORMAT, "crc32": zlib.crc32(body), "bytes": len(body)})
    (folder / MANIFEST).write_bytes(head.encode() + b"\n" + body)
    sync(folder / _METADATA)
    sync(folder / MANIFEST)
    for rank in range(num_ranks):
        (folder / _part(rank)).unlink()


def _described(one: Mapping[str, Any]) -> Described:
    chunks = [
        Chunk(tuple(offsets), tuple(sizes), Place(file, begin, crcs))
        for offsets, sizes, file, begin, crcs in one["chunks"]
    ]
    dtype = getattr(torch, one["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{one['dtype']!r} is no dtype")
    return Described(tuple(one["shape"]), dtype, chunks)


class Files:
    """One checkpoint, open for reading.

    Args:
        path: Its folder.

    Attributes:
        name: The folder's, for messages.
        step: Steps taken when it was saved.
        tree: Its state, without the tensors.
        tensors: What tensors it has, by name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is no checkpoint of this package's, or the manifest is damaged, or a file is
            cut off.
    """

    def __init__(self, path: Path) -> None:
        """Read the manifest and look at the files' sizes."""
        self.path, self.name = path, str(path)
        content = _read_manifest(path)
        try:
            self.step, self.tree = int(content["step"]), content["state"]
            self.tensors: Mapping[str, Described] = {
                name: _described(one) for name, one in content["tensors"].items()
            }
            files = {str(name): int(size) for name, size in content["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged ({error!r})") from error
        for name, size in files.items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise FileNotFoundError(f"checkpoint {path}: file {name} is missing")
            if file.stat().st_size != size:
                raise ValueError(
                    f"checkpoint {path}: file {name} has {file.stat().st_size} bytes, {size} were "
                    "written; take another checkpoint"
                )
        places = {c.place.file for one in self.tensors.values() for c in one.chunks}
        if unknown := sorted(places - files.keys()):
            raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged: no sizes of {unknown}")

    def read(self, name: str, chunk: Chunk, rows: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Read rows of a chunk, piece by piece, and check each piece.

        Raises:
            ValueError: A piece is damaged.
        """
        dtype, sizes = self.tensors[name].dtype, chunk.sizes or (1,)
        step = piece_rows(sizes, dtype)
        row_bytes = dtype.itemsize * torch.Size(sizes[1:]).numel()
        buffer = torch.empty(min(step, sizes[0]) * row_bytes, dtype=torch.uint8)
        view: Any = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's annotation
        with (self.path / chunk.place.file).open("rb", buffering=0) as file:
            for first in range(rows[0] // step * step, rows[1], step):
                count = min(step, sizes[0] - first)
                size, number = count * row_bytes, first // step
                file.seek(chunk.place.begin + first * row_bytes)
                num_read = file.readinto(view[:size])
                crcs = [0, *chunk.place.crcs[max(0, number - 1) : number + 1]][-2:]
                if num_read != size or zlib.crc32(view[:size], crcs[0]) != crcs[1]:
                    raise ValueError(
                        f"checkpoint {self.path}: file {chunk.place.file} is damaged in tensor "
                        f"{name!r}, between bytes {file.tell() - (num_read or 0)} and "
                        f"{file.tell()}; take another checkpoint"
                    )
                yield first, buffer[:size].view(dtype).view(count, *sizes[1:])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path}: file {MANIFEST} is missing")
    head, _, body = file.read_bytes().partition(b"\n")
    try:
        told = json.loads(head)
        found, crc = told["format"], told["crc32"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path}: {MANIFEST} is no manifest of a checkpoint, or is cut off"
        ) from error
    if found != FORMAT:
        raise ValueError(f"checkpoint {path}: it is of format {found!r}; this reads {FORMAT!r}")
    if zlib.crc32(body) != crc:
        raise ValueError(
            f"checkpoint {path}: {MANIFEST} is cut off or damaged ({len(body)} bytes, "
            f"{told.get('bytes')} were written); take another checkpoint"
        )
    content: dict[str, Any] = json.loads(body)
    return content
