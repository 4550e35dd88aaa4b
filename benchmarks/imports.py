"""What `import shardwise` costs over `import torch`, and what an installation weighs.

Each time is that of one import in a fresh process that has imported torch before, so it is what the
library adds. torchrec, where it can be imported, is timed in turn with ours. Sizes are those of the
files that belong to a package, and of the packages it requires other than torch. Rows of results go
to benchmarks/results/imports.csv.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from shardwise.bench.results import OURS, RESULTS, ROOT, Results
from shardwise.bench.timing import Times

MODULES = {"torch": "torch", OURS: "shardwise", "torchrec": "torchrec"}
CODE = """
import time, warnings
warnings.simplefilter("ignore")
before = "{module}" == "torch" or __import__("torch")
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def main() -> None:
    """Time the imports of fresh processes, in turn, and add up the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=int, default=10, help="processes of each; the median is reported")
    add("--csv", type=Path, help="where rows are added (with --quick: none unless given)")
    add("--quick", action="store_true", help="3 processes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 3
    elif options.csv is None:
        options.csv = RESULTS / "imports.csv"
    results = Results(options.csv, "ms")
    seconds: dict[str, list[float]] = {}
    for i in range(options.repeats + 1):  # the first round fills the caches of files
        for name, module in MODULES.items():
            took = import_time(module)
            if i == 0 and took is not None:
                seconds[name] = []
            elif took is not None:
                seconds[name].append(took)
    results.add({"what": "import"}, {name: Times(each) for name, each in seconds.items()})
    print()
    for name, sizes in {OURS: own_sizes, "torchrec": peer_sizes}.items():
        if name in seconds:
            package, required = sizes()
            results.add_size({"what": "the package"}, name, package)
            results.add_size({"what": "what it requires beside torch"}, name, required)


def import_time(module: str) -> float | None:
    """Seconds that a fresh process takes to import a module after torch; None if it cannot."""
    code = CODE.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def own_sizes() -> tuple[int, int]:
    """Bytes of this library as a wheel installs it, and of what it requires beside torch."""
    files = (ROOT / "shardwise").rglob("*")
    package = sum(f.stat().st_size for f in files if f.is_file() and "__pycache__" not in f.parts)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return package, installed_size(required_by(project["dependencies"]))


def peer_sizes() -> tuple[int, int]:
    """Bytes of torchrec with FBGEMM, and of what they require beside torch."""
    package = {"torchrec", "fbgemm-gpu-cpu"}
    lines = [line for name in package for line in requirements(name)]
    return installed_size(package), installed_size(required_by(lines) - package)


def required_by(lines: list[str]) -> set[str]:
    """Packages that requirement lines ask for, directly or not, torch's own apart."""
    found: set[str] = set()
    left = list(lines)
    while left:
        line = left.pop()
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0].lower()
        if "extra ==" not in line and name not in found | {"torch"}:
            found.add(name)
            left += requirements(name)
    return found


def requirements(package: str) -> list[str]:
    """The requirement lines of a package; none when it is not installed."""
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def installed_size(packages: set[str]) -> int:
    """Bytes of the packages' files; those that are not installed count nothing."""
    total = 0
    for package in packages:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = [Path(str(file.locate())) for file in files if "__pycache__" not in file.parts]
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total


if __name__ == "__main__":
    main()
