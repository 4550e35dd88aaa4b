"""How fast this machine reads and writes rows: what no lookup or update can beat.

Over 2 GB of rows of 64 to 1,024 bytes, in 4 KB and in 2 MB pages, with rows fetched 32 ahead and
not at all, by 1 and 2 threads: all rows in order (read), 2^20 random rows (gather), the same
written one after the other into memory that was used before (gather and write), and distinct rows
read, changed and written back, at random (modify) and in order of their numbers (modify sorted).
GB/s count what is read and what is written. Compiled by g++ for the machine at hand.
"""

import ctypes
import functools
import mmap
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shardwise.bench.options import Options
from shardwise.bench.results import Results
from shardwise.bench.timing import time_in_turn

AHEAD = 32
ROW_BYTES = (64, 128, 256, 512, 1024)
PAGES = {"4 KB": mmap.MADV_NOHUGEPAGE, "2 MB": mmap.MADV_HUGEPAGE}


def run(results: Results, options: Options) -> None:
    """Time all passes at each row width, kind of pages, distance and number of threads."""
    span, num_ids = (1 << 26, 1 << 14) if options.quick else (1 << 31, 1 << 20)
    for pages in PAGES:
        data, out = (allocate(size, pages) for size in (span, num_ids * ROW_BYTES[-1]))
        for row_bytes in ROW_BYTES:
            rows = data.view(-1, row_bytes // 4)
            ids = torch.randperm(rows.shape[0])[:num_ids]
            for threads in options.threads:
                torch.set_num_threads(threads)
                for ahead in (0, AHEAD):
                    what = {"row_bytes": row_bytes, "pages": pages}
                    what |= {"ahead": ahead, "threads": threads}
                    _time_passes(results, what, rows, ids, out, options.repeats)


def _time_passes(
    results: Results,
    what: dict[str, object],
    rows: Tensor,
    ids: Tensor,
    out: Tensor,
    repeats: int,
) -> None:
    ahead = int(str(what["ahead"]))
    in_order = ids.sort().values.view(1, -1)
    bags = ids.view(1, -1, 1)
    moved = ids.numel() * rows.shape[1] * 4
    runs: dict[str, tuple[int, Callable[[int], object]]] = {
        "read": (rows.nbytes, lambda _: stream(rows)),
        "gather": (moved, lambda _: gather([rows], bags, None, ahead)),
        "gather and write": (2 * moved, lambda _: gather([rows], bags, out, ahead)),
        "modify": (2 * moved, lambda _: modify([rows], bags[:, :, 0], ahead)),
        "modify sorted": (2 * moved, lambda _: modify([rows], in_order, ahead)),
    }
    if ahead:
        del runs["read"]
    for name, (num_bytes, times) in {
        name: (size, time_in_turn({name: body}, repeats)[name])
        for name, (size, body) in runs.items()
    }.items():
        results.add_rate({"pass": name, **what}, times, num_bytes)


def allocate(num_bytes: int, pages: str) -> Tensor:
    """Map memory in pages of that size, filled with ones."""
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(PAGES[pages])
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def stream(data: Tensor) -> None:
    """Read all of a tensor, on torch's number of threads."""
    _library().stream(_address(data), *_numbers(data.numel(), torch.get_num_threads()))


def gather(rows: Sequence[Tensor], ids: Tensor, out: Tensor | None, ahead: int = AHEAD) -> None:
    """Read what a lookup of ids [tables, bags, pooling] reads; write what it writes, if `out`."""
    sizes, target = _numbers(*ids.shape), _address(out)
    numbers = _numbers(ahead, torch.get_num_threads())
    _check(_library().gather(*_tables(rows), _address(ids), *sizes, target, *numbers), rows)


def modify(rows: Sequence[Tensor], ids: Tensor, ahead: int = AHEAD) -> None:
    """Change the rows of ids [tables, ids], none of them twice."""
    numbers = _numbers(*ids.shape, ahead, torch.get_num_threads())
    _check(_library().modify(*_tables(rows), _address(ids), *numbers), rows)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous(), "the probe reads contiguous memory"
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _numbers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def _tables(rows: Sequence[Tensor]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.c_int64]:
    pointers = (ctypes.c_void_p * len(rows))(*[table.data_ptr() for table in rows])
    return pointers, ctypes.c_int64(rows[0].shape[1] * rows[0].element_size() // 4)


def _check(is_known: bool, rows: Sequence[Tensor]) -> None:
    if not is_known:
        raise ValueError(f"the probe knows rows of {ROW_BYTES} bytes, not of {rows[0][0].nbytes}")


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the probe.

    Raises:
        OSError: There is no g++, or it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "probe.so")
        source = Path(__file__).with_name("probe.cpp")
        flags = ["-std=c++20", "-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC", "-pthread"]
        command = ["g++", *flags, str(source), "-o", str(binary)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise OSError(f"the probe does not compile: {built.stderr}")
        library = ctypes.CDLL(str(binary))
    library.gather.restype = library.modify.restype = ctypes.c_bool
    return library
