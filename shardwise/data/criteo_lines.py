"""Read a large text file in blocks of whole lines, never holding more than one block and one line.

What the lines mean is left to `criteo_fields`.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some consecutive lines of a file, or in their place one line that cannot be taken in.

    Attributes:
        first_line: Number of the first line, from 1.
        text: The lines, each ending in a newline (never in CRLF); empty if there is a fault.
        fault: What is wrong with the one line; empty if nothing is.
    """

    first_line: int
    text: bytes
    fault: str = ""


def read_blocks(path: Path, *, block_bytes: int, max_line_bytes: int) -> Iterator[Block]:
    """Give the lines of a file, a block after the other.

    A file ending in `.gz` is unpacked on the way; a byte order mark is dropped and CRLF becomes a
    plain newline. Faults are a line that goes on for more than `max_line_bytes` beyond the piece
    it begins in, which is passed over without being kept, and a last line without its newline.

    Args:
        path: The file.
        block_bytes: Size of the pieces read at once.
        max_line_bytes: How much of an unfinished line is kept.

    Raises:
        ValueError: The file is empty, or not a whole gzip file.
    """
    line, rest, is_too_long, is_empty = 1, b"", False, True
    too_long = f"longer than {max_line_bytes} bytes"
    for piece in _pieces(path, block_bytes):
        is_empty = False
        if is_too_long:
            _, newline, piece = piece.partition(b"\n")
            if not newline:
                continue
            yield Block(first_line=line, text=b"", fault=too_long)
            line, is_too_long = line + 1, False
        rest += piece
        end = rest.rfind(b"\n") + 1
        text, rest = rest[:end], rest[end:]
        if text:
            # One byte is found much faster than two, which are rarely there.
            plain = text.replace(b"\r\n", b"\n") if b"\r" in text else text
            yield Block(first_line=line, text=plain)
            line += text.count(b"\n")
        if len(rest) > max_line_bytes:
            rest, is_too_long = b"", True
    if is_empty:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    if is_too_long:
        yield Block(first_line=line, text=b"", fault=too_long)
    elif rest:
        fault = f"the file ends in mid-line, after {rest[-60:]!r}, wanted a newline; fetch it again"
        yield Block(first_line=line, text=b"", fault=fault)


def _pieces(path: Path, num_bytes: int) -> Iterator[bytes]:
    """Read a file piece by piece, without a byte order mark."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        try:
            head = file.read(len(_BOM))
            if head not in (b"", _BOM):
                yield head
            while piece := file.read(num_bytes):
                yield piece
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: cut off or not gzip ({error}); fetch it again") from error
