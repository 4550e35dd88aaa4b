"""Read a large text file in blocks of whole lines, never holding more than one block and one line.

What the lines mean is left to `criteo_fields`.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a line begins.

    Attributes:
        byte: Bytes before it, unpacked.
        line: Its number.
    """

    byte: int = 0
    line: int = 1


_START = Place()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some consecutive lines of a file, or in their place one line that cannot be taken in.

    Attributes:
        first_line: Number of the first line, from 1.
        end: Where the next block begins.
        text: The lines, each ending in a newline (never in CRLF); empty if there is a fault.
        fault: What is wrong with the one line; empty if nothing is.
    """

    first_line: int
    end: Place
    text: bytes
    fault: str = ""


def read_blocks(
    path: Path, *, block_bytes: int, max_line_bytes: int, start: Place = _START
) -> Iterator[Block]:
    """Give the lines of a file, a block after the other; from another start, the same blocks.

    A file ending in `.gz` is unpacked on the way; a byte order mark is dropped and CRLF becomes a
    plain newline. Faults are a line that goes on for more than `max_line_bytes` beyond the piece
    it begins in, which is passed over without being kept, and a last line without its newline.

    Args:
        path: The file.
        block_bytes: Size of the pieces read at once.
        max_line_bytes: How much of an unfinished line is kept.
        start: Where to begin: at the first line, or the `end` of a block.

    Raises:
        ValueError: The file is empty, or not a whole gzip file, or no line begins at `start`.
    """
    (byte, line), rest, is_too_long, is_empty = start, b"", False, start.byte == 0
    too_long = f"longer than {max_line_bytes} bytes"
    for piece in _pieces(path, block_bytes, start.byte):
        if piece == _BOM and byte == 0:
            byte = len(_BOM)
            continue
        is_empty = False
        if is_too_long:
            passed, newline, piece = piece.partition(b"\n")
            byte += len(passed + newline)
            if not newline:
                continue
            yield Block(first_line=line, end=Place(byte, line + 1), text=b"", fault=too_long)
            line, is_too_long = line + 1, False
        rest += piece
        end = rest.rfind(b"\n") + 1
        text, rest = rest[:end], rest[end:]
        if text:
            # One byte is found much faster than two, which are rarely there.
            plain = text.replace(b"\r\n", b"\n") if b"\r" in text else text
            here, byte, line = line, byte + end, line + text.count(b"\n")
            yield Block(first_line=here, end=Place(byte, line), text=plain)
        if len(rest) > max_line_bytes:
            byte, rest, is_too_long = byte + len(rest), b"", True
    if is_empty:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    if is_too_long:
        yield Block(first_line=line, end=Place(byte, line), text=b"", fault=too_long)
    elif rest:
        fault = f"the file ends in mid-line, after {rest[-60:]!r}, wanted a newline; fetch it again"
        yield Block(first_line=line, end=Place(byte + len(rest), line), text=b"", fault=fault)


def _pieces(path: Path, num_bytes: int, start: int) -> Iterator[bytes]:
    """Read a file piece by piece, of which the first is only as long as a byte order mark.

    From another start, what is left of the piece that it lies in comes first.
    """
    mark = len(_BOM)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        try:
            if start:
                file.seek(start - 1)
                if file.read(1) != b"\n":
                    raise ValueError(
                        f"{path}: no line begins at byte {start}; the position is of another file"
                    )
            size = num_bytes - (start - mark) % num_bytes if start >= mark else mark - start
            while piece := file.read(size):
                yield piece
                size = num_bytes
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: cut off or not gzip ({error}); fetch it again") from error
