"""What importing shardwise, and TorchRec where it is installed, adds to `import torch`."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from contest.results import OURS, RESULTS, Results
from contest.timing import Times

CODE = """
import importlib, sys, time, torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


def seconds_to_import(package: str) -> float:
    """Import the package in a fresh process that has torch."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, package]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Import each package in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="fresh processes per package")
    parser.add_argument(
        "--csv", type=Path, default=RESULTS / "import_time.csv", help="where rows are added"
    )
    options = parser.parse_args()
    packages = [OURS] + ["torchrec"] * (importlib.util.find_spec("torchrec") is not None)
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(options.repeats):
        for package in packages:
            seconds[package].append(seconds_to_import(package))
    results = Results(options.csv, "s")
    results.add(
        {"what": "import after torch"}, {name: Times(times) for name, times in seconds.items()}
    )


if __name__ == "__main__":
    main()
