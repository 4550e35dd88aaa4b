"""Saving and loading a model with tables of some GB beside `torch.save` and plain DCP.

One process with 8 tables and row-wise Adagrad's sums. In turn, each in a new folder:

* save: `Checkpoints.save` (checksums, synced to the disk), `torch.save` (no checksums; synced here
  afterwards, for the same promise) and torch's distributed checkpoint (`dcp`; it syncs, too).
* load: `Checkpoints.load`, `torch.load` with `mmap` and `load_state_dict`, `dcp.load`, in place.
  The files are in the system's cache; that is the worst case for checksums.
* the peak of memory that each adds to the model, in a process of its own.
* training, a matrix product per step with no save, and with one beside it (`wait=False`): how much
  longer the steps took and how long the call to `save` was, as shares of the time of writing.

With --write, rows go to benchmarks/results/checkpoint.csv.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from shardwise.bench.results import OURS, RESULTS, Results
from shardwise.bench.timing import Times, time_in_turn
from shardwise.checkpoint import Checkpoints
from shardwise.checkpoint.folder import sync
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

NUM_TABLES, WIDTH = 8, 128
CONTENDERS = (OURS, "torch", "dcp")
State = dict[str, Any]


def main() -> None:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gb", type=float, default=4.0, help="size of the tables")
    add("--repeats", type=int, default=5, help="rounds; the median is reported")
    add("--what", nargs="+", default=["save", "load", "memory", "beside"], help="parts to measure")
    add("--folder", type=Path, help="where to write; by default where temporary files are")
    add("--write", action="store_true", help="add rows to the CSV file")
    add("--quick", action="store_true", help="20 MB, 2 rounds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.gb, options.repeats = 0.02, 2
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    results = Results(RESULTS / "checkpoint.csv" if options.write else None, "s")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for what in options.what:
            measure = {"save": saves, "load": loads, "memory": peaks, "beside": beside}[what]
            measure(options, Path(name), results)


def make(gb: float) -> State:
    """Make the tables and their optimizer."""
    rows = int(gb * 1e9 / (4 * WIDTH * NUM_TABLES))
    names = [f"t{number}" for number in range(NUM_TABLES)]
    model = EmbeddingBagCollection([EmbeddingBagConfig(rows, WIDTH, name) for name in names])
    return {"model": model, "optimizer": in_backward(model, RowWiseAdagrad, lr=0.1)}


def dicts(state: State) -> State:
    """Give the state dicts, which share the memory of the objects."""
    return {name: one.state_dict() for name, one in state.items()}


def save(contender: str, state: State, folder: Path) -> None:
    """Save with one of the contenders, until the disk has it."""
    if contender == OURS:
        Checkpoints(folder).save(1, state)
    elif contender == "dcp":
        dcp.save(dicts(state), checkpoint_id=folder, no_dist=True)
    else:
        folder.mkdir()
        torch.save(dicts(state), folder / "all.pt")
        sync(folder / "all.pt")


def load(contender: str, state: State, folder: Path) -> None:
    """Load with one of the contenders into the memory that is there."""
    if contender == OURS:
        Checkpoints(folder).load(state)
    elif contender == "dcp":
        dcp.load(dicts(state), checkpoint_id=folder, no_dist=True)
    else:
        saved = torch.load(folder / "all.pt", mmap=True)
        for name, one in state.items():
            one.load_state_dict(saved[name])


def saves(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Time saves."""
    state = make(options.gb)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(options.repeats + 1):
        for name in CONTENDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            save(name, state, folder / name)
            if number:
                seconds[name].append(time.perf_counter() - start)
    for name in CONTENDERS:
        shutil.rmtree(folder / name)
    add(results, options, "save", {name: Times(each) for name, each in seconds.items()})


def loads(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Time loads of files that are in the system's cache."""
    state = make(options.gb)
    for name in CONTENDERS:
        save(name, state, folder / name)
    runs = {name: lambda _, name=name: load(name, state, folder / name) for name in CONTENDERS}
    times = time_in_turn(runs, options.repeats, warmups=1)
    for name in CONTENDERS:
        shutil.rmtree(folder / name)
    add(results, options, "load", times)


def add(results: Results, options: argparse.Namespace, what: str, times: dict[str, Times]) -> None:
    """Keep times, and print the speed."""
    results.add({"what": what, "gb": options.gb}, times)
    for name, each in times.items():
        print(f"  {name:24} {options.gb / each.median:8.2f} GB/s")


def peaks(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Measure what saving and loading add to the peak of memory."""
    context = multiprocessing.get_context("spawn")
    for name in (OURS, f"{OURS}, beside", "torch", "dcp"):
        with context.Pool(1) as pool:
            peak = pool.apply(peak_of, (name, options.gb, folder / name))
        for what, size in zip(("save", "load"), peak, strict=True):
            results.add_size({"what": f"peak of {what}", "gb": options.gb}, name, size)
        shutil.rmtree(folder / name)


def peak_of(contender: str, gb: float, folder: Path) -> tuple[int, int]:
    """Give the bytes that a save and then a load add to the peak, in a process of its own."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    state = make(gb)
    sizes = [resident_peak()]
    if contender.endswith("beside"):
        Checkpoints(folder).save(1, state, wait=False).result()
        contender = OURS
    else:
        save(contender, state, folder)
    sizes.append(resident_peak())
    load(contender, state, folder)
    sizes.append(resident_peak())
    return sizes[1] - sizes[0], sizes[2] - sizes[1]


def resident_peak() -> int:
    """Give this process's peak of memory so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def beside(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Measure how much a save beside training stalls it."""
    state = make(options.gb)
    run, square = Checkpoints(folder / "run", keep=1), torch.randn(512, 512)
    run.save(0, state, wait=False).result()  # the first one allocates the memory of copies

    def steps(until: Callable[[], bool]) -> list[float]:
        taken = []
        while not until():
            start = time.perf_counter()
            square @ square
            taken.append(time.perf_counter() - start)
        return taken

    calls, slower, writes = [], [], []
    for number in range(1, options.repeats + 1):
        end = time.perf_counter() + 2
        alone = steps(lambda end=end: time.perf_counter() > end)
        start = time.perf_counter()
        pending = run.save(number, state, wait=False)
        calls.append(time.perf_counter() - start)
        meanwhile = steps(lambda pending=pending: pending.is_done)
        writes.append(time.perf_counter() - start)
        usual = sum(alone) / len(alone)
        slower.append(max(0.0, sum(meanwhile) - usual * len(meanwhile)))
    shutil.rmtree(folder / "run")
    times = {OURS: Times(writes), "the call": Times(calls), "steps took longer": Times(slower)}
    results.add({"what": "save beside training", "gb": options.gb}, times)
    stalls = sorted((c + s) / w for c, s, w in zip(calls, slower, writes, strict=True))
    print(f"  stall: {100 * stalls[len(stalls) // 2]:.1f} % of the time of writing")


if __name__ == "__main__":
    main()
