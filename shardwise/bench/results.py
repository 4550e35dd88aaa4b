"""Results of benchmarks: lines for the reader, and CSV rows that say where they were measured."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from shardwise.bench.timing import Times

ROOT = Path(__file__).parents[2]
IS_CHECKOUT = (ROOT / "benchmarks").is_dir()
RESULTS = ROOT / "benchmarks" / "results" if IS_CHECKOUT else Path("results")
OURS = "shardwise"

_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


class Results:
    """Prints results as they come and appends them to a CSV file.

    Args:
        path: The file; None writes none.
        unit: Of all times: s, ms or µs.
    """

    def __init__(self, path: Path | None, unit: str) -> None:
        """Describe the machine."""
        self._path = path
        self._unit = unit
        self._place = describe_machine()
        print(", ".join(f"{name} {value}" for name, value in self._place.items()))

    def has(self, what: Mapping[str, object]) -> bool:
        """Whether the file has rows of `what` from this machine and this commit, unchanged."""
        if self._path is None or not self._path.exists() or str(self._place["commit"])[-1] == "+":
            return False
        wanted = {name: str(value) for name, value in {**what, **self._place}.items()}
        with self._path.open(newline="") as file:
            return any(wanted.items() <= row.items() for row in csv.DictReader(file))

    def add(self, what: Mapping[str, object], times: Mapping[str, Times]) -> None:
        """Print one line per contender, with its ratio to ours, and keep a row of each.

        Args:
            what: What was measured; columns of the file, alike in all calls.
            times: Times by contender.
        """
        print("\n" + " ".join(f"{name}={value}" for name, value in what.items()))
        scale = _UNITS[self._unit]
        for name, each in times.items():
            low, high = (scale * quartile for quartile in each.quartiles)
            median = scale * each.median
            ratio = each.median / times[OURS].median if OURS in times else float("nan")
            print(
                f"  {name:24} {median:10.3f} {self._unit}  [{low:.3f}, {high:.3f}]  {ratio:6.2f}x"
            )
            spread = {"quartile1": f"{low:.4f}", "quartile3": f"{high:.4f}"}
            spread |= {"repeats": str(len(each.seconds)), "ratio_to_ours": f"{ratio:.3f}"}
            self._keep(what, name, median, self._unit, spread)

    def add_rate(self, what: Mapping[str, object], times: Times, num_bytes: int) -> None:
        """Print and keep the GB/s of the machine, which moved `num_bytes` in each run."""
        low, middle, high = (
            num_bytes / 1e9 / t for t in (times.quartiles[1], times.median, times.quartiles[0])
        )
        print(
            f"  {middle:8.1f} GB/s  " + " ".join(f"{name}={value}" for name, value in what.items())
        )
        spread = {"quartile1": f"{low:.4f}", "quartile3": f"{high:.4f}"}
        spread["repeats"] = str(len(times.seconds))
        self._keep(what, "probe", middle, "GB/s", spread)

    def add_size(self, what: Mapping[str, object], contender: str, num_bytes: int) -> None:
        """Print and keep a size in MB."""
        print(f"  {contender:24} {num_bytes / 1e6:10.1f} MB  " + ", ".join(map(str, what.values())))
        self._keep(what, contender, num_bytes / 1e6, "MB", {})

    def _keep(
        self,
        what: Mapping[str, object],
        contender: str,
        value: float,
        unit: str,
        spread: Mapping[str, object],
    ) -> None:
        row = {**what, "contender": contender, "value": f"{value:.4f}", "unit": unit}
        row |= dict.fromkeys(("quartile1", "quartile3", "repeats", "ratio_to_ours"), "")
        if self._path is not None:
            _append(self._path, {**row, **spread, **self._place})


def _append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a file; a file of other columns is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(row)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(f"{path} has columns {found}, not {columns}; move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def describe_machine() -> dict[str, object]:
    """Name the processor, its cores, torch's version and the commit (+ where files differ)."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((f for f in ("avx512f", "avx2") if f in flags), "")
    return f"{names[0] if names else platform.machine()} {widest}".strip()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "shardwise", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
