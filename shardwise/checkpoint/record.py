"""The bytes of a file of tensors: each lies raw in the frame of an archive that `torch.load` reads.

So torch's distributed checkpoint reads these files as its own (`describe` makes its `.metadata`),
while this package finds the raw bytes by the manifest and never unpickles anything.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardwise.checkpoint.source import PIECE_BYTES, Described

_MAX = 0xFFFFFFFF  # the true number follows in a field of 8 bytes
_VERSION, _DATE = 45, 0x21
_ALIGNED = 64


def write_tensor(file: BinaryIO, tensor: Tensor) -> tuple[int, int, int, list[int]]:
    """Append a tensor, piece by piece, so that no copy of it is made.

    Returns:
        Where its frame begins, where its bytes begin, where the frame ends; and the CRC-32 of all
        bytes up to the end of each piece.
    """
    size = tensor.numel() * tensor.element_size()
    files = {"data.pkl": _describe_tensor(tensor), "version": b"3\n", "byteorder": b"little"}
    head, entries = b"", []
    for name, data in files.items():
        entries.append((name, len(data), zlib.crc32(data), len(head)))
        head += _local_header(*entries[-1][:3]) + data
    at = len(head)
    head += _local_header("data/0", size, 0)
    begin = -(-(file.tell() + len(head)) // _ALIGNED) * _ALIGNED - len(head)
    _write(file, memoryview(b"\0" * (begin - file.tell()) + head))
    crcs = [0]
    with ThreadPoolExecutor(1) as beside:
        for piece in pieces(tensor):
            crc = beside.submit(zlib.crc32, piece, crcs[-1])
            _write(file, piece)
            crcs.append(crc.result())
    entries.append(("data/0", size, crcs[-1], at))
    _write(file, memoryview(_directory(entries, len(head) + size)))
    return begin, begin + len(head), file.tell(), crcs[1:]


def _write(file: BinaryIO, data: memoryview) -> None:
    while len(data):  # an unbuffered file may take less than all
        data = data[file.write(data) :]


def piece_rows(sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Give the rows of a piece: at most 4 MiB of them, at least one."""
    row = dtype.itemsize
    for size in sizes[1:]:
        row *= size
    return max(1, PIECE_BYTES // max(1, row))


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Give the bytes of a tensor row after row, in pieces, wherever it lies."""
    rows = tensor.detach() if tensor.dim() else tensor.detach()[None]
    if rows.numel():
        for some in rows.split(piece_rows(tuple(rows.shape), rows.dtype)):
            yield memoryview(some.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _local_header(name: str, size: int, crc: int) -> bytes:
    full = f"archive/{name}".encode()
    fields = (b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, _MAX, _MAX, len(full), 20)
    return struct.pack("<4s5H3L2H", *fields) + full + struct.pack("<2H2Q", 1, 16, size, size)


def _directory(entries: list[tuple[str, int, int, int]], at: int) -> bytes:
    """Give the end of the archive, of entries (name, size, CRC, place), that begins at a place."""
    text = b""
    for name, size, crc, place in entries:
        full = f"archive/{name}".encode()
        counts = (len(full), 28, 0, 0, 0, 0, _MAX)
        fields = (b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DATE, crc, _MAX, _MAX, *counts)
        text += struct.pack("<4s6H3L5H2L", *fields) + full
        text += struct.pack("<2H3Q", 1, 24, size, size, place)
    count, length = len(entries), len(text)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, at)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, at + length, 1)
    return text + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _MAX, _MAX, 0)


class _Bytes:
    """Stands for the storage of a tensor."""


class _Rebuilt:
    def __init__(self, tensor: Tensor) -> None:
        self.size, self.dtype = tuple(tensor.shape), tensor.dtype

    def __reduce__(self) -> Any:
        strides = tuple(torch.empty(self.size, device="meta").stride())
        rebuild: Any = torch._utils._rebuild_tensor_v3  # of any dtype
        return rebuild, (_Bytes(), 0, self.size, strides, False, OrderedDict(), self.dtype)


def _describe_tensor(tensor: Tensor) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            size = tensor.numel() * tensor.element_size()
            is_bytes = isinstance(value, _Bytes)
            return ("storage", torch.UntypedStorage, "0", "cpu", size) if is_bytes else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(_Rebuilt(tensor))
    return buffer.getvalue()


def describe(
    tensors: Mapping[str, Described], frames: Mapping[tuple[str, Any], tuple[str, int, int]]
) -> bytes:
    """Make the `.metadata` of torch's distributed checkpoint.

    Args:
        tensors: By name.
        frames: By name and offsets of a chunk, its file and where its frame begins and ends.
    """
    from torch.distributed.checkpoint import metadata  # takes 0.7 s
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described: dict[str, Any] = {}
    stored = {}
    for name, one in tensors.items():
        chunks = [
            metadata.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
            for c in one.chunks
        ]
        properties = metadata.TensorProperties(dtype=one.dtype)
        described[name] = metadata.TensorStorageMetadata(properties, torch.Size(one.shape), chunks)
        for chunk in one.chunks:
            file, begin, end = frames[name, chunk.offsets]
            index = metadata.MetadataIndex(name, torch.Size(chunk.offsets))
            stored[index] = _StorageInfo(file, begin, end - begin)
    return pickle.dumps(metadata.Metadata(described, storage_data=stored))
