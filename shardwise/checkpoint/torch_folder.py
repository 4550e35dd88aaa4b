"""Folders of torch's distributed checkpoint as a source of tensors; nothing in them is run.

Such a folder describes its tensors in a pickle, `.metadata`, and each block of a tensor is an
archive as `torch.save` writes it, at some place in a file. Both are read here with no more than the
names they need, block by block in small pieces, and the checksum of a block is looked at.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from shardwise.checkpoint.source import PIECE_BYTES, Chunk, Described
from shardwise.sharding.sliced import Sizes

_METADATA = ".metadata"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,  # of zipfile, for ways to compress that it does not know
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Place:
    """Where a block lies: bytes of a file."""

    file: str
    begin: int
    num_bytes: int


class TorchFolder:
    """A folder of torch's distributed checkpoint, open for reading.

    Args:
        path: The folder.

    Attributes:
        name: The folder's, for messages.
        tensors: What tensors it has, by name. What else it holds, which is pickled, is left alone.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The description is damaged or names what no description needs, or a file is cut
            off.
    """

    def __init__(self, path: Path) -> None:
        """Read the description, and look at the files' sizes."""
        self.path, self.name = path, str(path)
        if not (path / _METADATA).is_file():
            raise FileNotFoundError(
                f"checkpoint {path}: file {_METADATA} is missing; name a folder that "
                "torch.distributed.checkpoint wrote"
            )
        try:
            with (path / _METADATA).open("rb") as file:
                self.tensors: Mapping[str, Described] = _describe(_Description(file).load())
        except _DAMAGE as error:
            raise ValueError(f"checkpoint {path}: {_METADATA} is damaged ({error})") from error
        for described in self.tensors.values():
            for chunk in described.chunks:
                self._check(chunk.place)

    def _check(self, place: Place) -> None:
        file = self.path / place.file
        if Path(place.file).name != place.file or not file.is_file():
            raise FileNotFoundError(f"checkpoint {self.path}: file {place.file} is missing")
        size = file.stat().st_size
        if place.begin < 0 or place.num_bytes < 0 or place.begin + place.num_bytes > size:
            raise ValueError(
                f"checkpoint {self.path}: file {place.file} has {size} bytes, a tensor lies at "
                f"{place.begin} to {place.begin + place.num_bytes}; take another checkpoint"
            )

    def read(self, name: str, chunk: Chunk, rows: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Read rows of a block, piece by piece.

        Raises:
            ValueError: The block is damaged, which is known for sure only after the last piece.
        """
        sizes, place = chunk.sizes or (1,), chunk.place
        try:
            with (self.path / place.file).open("rb") as file:
                part: Any = io.BufferedReader(_Part(file, place.begin, place.num_bytes))
                for first, piece in _read_archive(part, sizes, self.tensors[name].dtype):
                    if first < rows[1] and first + piece.shape[0] > rows[0]:
                        yield first, piece
        except _DAMAGE as error:
            raise ValueError(
                f"checkpoint {self.path}: file {place.file} is damaged in tensor {name!r} "
                f"({error}); take another checkpoint"
            ) from error


# ---- the description


def _describe(metadata: Any) -> dict[str, Described]:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    found = {}
    for name, one in metadata.state_dict_metadata.items():
        if not isinstance(one, TensorStorageMetadata):
            continue
        if not isinstance(one.properties.dtype, torch.dtype):
            raise ValueError(f"tensor {name!r} has no dtype")
        chunks = []
        for saved in one.chunks:
            at = metadata.storage_data[MetadataIndex(name, torch.Size(saved.offsets))]
            if getattr(at, "transform_descriptors", None):
                raise ValueError(f"tensor {name!r} is stored by way of {at.transform_descriptors}")
            place = Place(str(at.relative_path), int(at.offset), int(at.length))
            chunks.append(Chunk(_sizes(saved.offsets), _sizes(saved.sizes), place))
        found[str(name)] = Described(_sizes(one.size), one.properties.dtype, chunks)
    return found


def _sizes(given: Any) -> Sizes:
    sizes = tuple(map(int, given))
    if any(size < 0 for size in sizes):
        raise ValueError(f"{sizes} are no sizes")
    return sizes


class _Description(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "_StorageInfo",
        }
    )
    _OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_described = module in self._MODULES and name in self._NAMES
        if is_dtype or is_described or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description needs")


# ---- a block


class _Recipe(NamedTuple):
    """What a tensor is made of: a storage (dtype, key, elements) and how it is viewed."""

    storage: tuple[torch.dtype, str, int]
    offset: int
    sizes: Sizes
    strides: Sizes


def _read_archive(
    part: io.BufferedIOBase, sizes: Sizes, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Read a tensor that `torch.save` wrote: rows with the number of the first, to the end."""
    with zipfile.ZipFile(part) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        recipe = _TensorPickle(io.BytesIO(archive.read(pickled))).load()
        if not isinstance(recipe, _Recipe) or (recipe.sizes or (1,)) != sizes:
            raise ValueError(f"there is no tensor of {list(sizes)} in it")
        if recipe.storage[0] != dtype:
            raise ValueError(f"it is {recipe.storage[0]}, and {dtype} in the description")
        storage = f"{pickled.removesuffix('data.pkl')}data/{recipe.storage[1]}"
        with archive.open(storage) as data:
            if recipe.strides == torch.empty(recipe.sizes, device="meta").stride():
                yield from _read_rows(data, recipe, sizes)
            else:
                flat = _tensor_of(data.read(), dtype)
                yield 0, flat.as_strided(recipe.sizes, recipe.strides, recipe.offset)
            while data.read(PIECE_BYTES):  # at its end the checksum is looked at
                pass


def _read_rows(data: Any, recipe: _Recipe, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    dtype = recipe.storage[0]
    row_bytes = prod(sizes[1:]) * dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    data.read(recipe.offset * dtype.itemsize)
    for first in range(0, sizes[0] if row_bytes else 0, step):
        count = min(step, sizes[0] - first)
        rows = data.read(count * row_bytes)
        if len(rows) != count * row_bytes:
            raise EOFError("it ends early")
        yield first, _tensor_of(rows, dtype).view(count, *sizes[1:])


def _tensor_of(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


class _TensorPickle(pickle.Unpickler):
    """Reads what a tensor is made of; makes none, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        found = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *given: _Recipe(*given[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda recipe, *rest: recipe,
            ("collections", "OrderedDict"): OrderedDict,
        }.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs")
        return found

    def persistent_load(self, given: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, key, _, num_elements = given
        return dtype, str(key), int(num_elements)


class _Part(io.RawIOBase):
    """A range of a file's bytes as a file."""

    def __init__(self, file: BinaryIO, begin: int, num_bytes: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no byte {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
