"""The safetensors format: 8 bytes of header length, a JSON header, then the bytes of the tensors.

A file holds no code. Whatever a header says is checked against the file before anything is read;
tensors are views of the file, of which the system reads what is touched.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors package has it


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file: bytes from `start` to before `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """A file before it is written: its first bytes, and where each tensor goes."""

    header: bytes
    entries: dict[str, Entry]

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return max((entry.stop for entry in self.entries.values()), default=len(self.header))


def num_bytes(tensor: Tensor) -> int:
    """Give the bytes of a whole value."""
    return tensor.numel() * tensor.dtype.itemsize


def lay_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
    """Say where tensors go in a file, those of wide dtypes first, so that all are aligned.

    Raises:
        ValueError: The format has no name for a dtype.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    at, spans = 0, {}
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r}: safetensors has no dtype {tensor.dtype}")
        spans[name] = (at, at + num_bytes(tensor))
        described[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(spans[name]),
        }
        at = spans[name][1]
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(tensors[name].dtype, tuple(tensors[name].shape), *(len(header) + x for x in s))
        for name, s in spans.items()
    }
    return Layout(header, entries)


def map_tensor(memory: mmap.mmap, entry: Entry) -> Tensor:
    """View a tensor in a mapped file."""
    numel = math.prod(entry.shape)
    if numel == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=numel, offset=entry.start)
    return flat.view(entry.shape)


class TensorFile:
    """A safetensors file, checked when opened and mapped when first read.

    Args:
        path: The file.

    Attributes:
        entries: Its tensors by name.
        metadata: The texts it was saved with.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, cut off, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"safetensors file {path}: there is no such file")
        self._memory: mmap.mmap | None = None
        self._size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if self._size < 8 or length > min(self._size - 8, _MAX_HEADER_BYTES):
                raise self._error(
                    f"its header would be {length} bytes long in a file of {self._size}; it is cut "
                    "off or of another format"
                )
            text = file.read(length)
        described = self._parse(text)
        metadata = described.pop("__metadata__", {})
        if not _is_texts(metadata):
            raise self._error("its __metadata__ is no map of texts")
        self.metadata: dict[str, str] = metadata
        self.entries = {name: self._entry(name, x, 8 + length) for name, x in described.items()}
        self._check_spans(8 + length)

    def read(self, name: str) -> Tensor:
        """View a tensor; what is written to the view does not reach the file."""
        if self._memory is None:
            with self.path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(self._memory) != self._size:
                raise self._error("its size has changed since it was opened")
        return map_tensor(self._memory, self.entries[name])

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            described = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is damaged or of another format ({error})") from error
        if not isinstance(described, dict):
            raise self._error("its header is no JSON object")
        return described

    def _entry(self, name: str, described: Any, data_start: int) -> Entry:
        try:
            dtype, shape, (start, stop) = (
                described[key] for key in ("dtype", "shape", "data_offsets")
            )
        except (TypeError, KeyError, ValueError) as error:
            what = "its header does not give dtype, shape and two data_offsets"
            raise self._error(f"tensor {name!r}: {what}") from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._error(f"tensor {name!r}: unknown dtype {dtype!r}; known are {[*DTYPES]}")
        is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not is_shape or math.prod(max(n, 1) for n in shape) >= 2**60:
            raise self._error(f"tensor {name!r}: {shape!r} is no shape")
        wanted = math.prod(shape) * DTYPES[dtype].itemsize
        if type(start) is not int or type(stop) is not int or stop - start != wanted:
            raise self._error(
                f"tensor {name!r}: {dtype} {shape} takes {wanted} bytes, its data_offsets are "
                f"{[start, stop]}"
            )
        return Entry(DTYPES[dtype], tuple(shape), data_start + start, data_start + stop)

    def _check_spans(self, data_start: int) -> None:
        """Check that the tensors follow one another to the end of the file."""
        at = data_start
        for name, entry in sorted(self.entries.items(), key=lambda x: (x[1].start, x[1].stop)):
            if entry.start != at:
                raise self._error(
                    f"tensor {name!r}: begins at byte {entry.start}, the one before ends at {at}; "
                    "tensors may neither overlap nor leave gaps"
                )
            at = entry.stop
        if at != self._size:
            raise self._error(
                f"its tensors end at byte {at}, the file at {self._size}; it is cut off, or "
                "something was added"
            )

    def _error(self, what: str) -> ValueError:
        return ValueError(f"safetensors file {self.path}: {what}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
