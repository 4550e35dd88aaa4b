"""`shardwise bench`: measure this machine and this package beside its peers."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from shardwise.bench.options import Options
from shardwise.bench.plot import plot
from shardwise.bench.results import RESULTS, Results

_BENCHMARKS = {
    "op": ("operators", "µs", "jagged inputs, dot products, lookups of one sample"),
    "module": ("module", "ms", "EmbeddingBagCollection, forward and training step"),
    "step": ("step", "ms", "a training step of a DLRM; processor time"),
    "probe": ("probe", "ms", "how fast this machine reads and writes rows (needs g++)"),
    "grid": ("grid", "ms", "every cell of the comparison of lookups with FBGEMM; 20 minutes"),
}
_ABOUT = """Measure op, module and step, or what is named, beside the peers that can be imported.

Shown are our time, each peer's, both with the quartiles of the rounds, and the peer's time as a
multiple of ours. Contenders run in turn in one process, on inputs that are checked to give equal
results where they hold tables. Rows with processor, torch and commit are added to FOLDER/NAME.csv,
from which FOLDER/NAME.png is drawn (needs matplotlib: pip install shardwise[bench]).

"""
_PEERS = """
Peers are torch.nn.EmbeddingBag, and where they are installed fbgemm-gpu-cpu and torchrec, of the
versions that go with the torch at hand, by pip install --no-deps. The machine should be idle.
"""


def main(options: Sequence[str]) -> int:
    """Run `shardwise bench` with what follows it on the command line; give the exit status."""
    read = _read(options)
    how = Options(tuple(read.threads), read.repeats, read.quick, not read.no_peers)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # of torchrec's process group of one
    for name in read.names or ("op", "module", "step"):
        module, unit, _ = _BENCHMARKS[name]
        path = (
            None if read.quick and not read.folder else Path(read.folder or RESULTS) / f"{name}.csv"
        )
        print(f"\n# {name}")
        import_module(f"shardwise.bench.{module}").run(Results(path, unit), how)
        if path is not None:
            try:
                print(f"\n{path}, {plot(path)}")
            except ModuleNotFoundError as error:
                print(f"\n{path}; no picture without {error.name}: pip install shardwise[bench]")
    return 0


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    listing = "\n".join(f"  {name:8}{about}" for name, (_, _, about) in _BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="shardwise bench",
        description=_ABOUT + listing,
        epilog=_PEERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", choices=_BENCHMARKS, help="what to measure; see above")
    add("--threads", nargs="+", type=int, default=[1, 2], help="torch's threads, each measured")
    add("--repeats", type=int, default=12, help="rounds that count; their median is reported")
    add(
        "--folder", help=f"where rows and pictures go; {RESULTS} unless given, with --quick nowhere"
    )
    add("--quick", action="store_true", help="small sizes, 3 rounds: only to see that it runs")
    add("--no-peers", action="store_true", help="measure us alone")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats = min(options.repeats, 3)
    if options.repeats < 2 or min(options.threads) < 1:
        parser.error("--repeats must be at least 2, --threads at least 1")
    return options


if __name__ == "__main__":  # where the package is on the path, but not installed
    sys.exit(main(sys.argv[1:]))
