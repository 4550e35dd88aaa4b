"""Jagged inputs on CPU beside torchrec: making them, permuting their keys, regrouping outputs.

26 keys, 8192 samples: a `KeyedJaggedTensor` is made from values and lengths, then its keys are put
into another order; the columns of two `KeyedTensor`s of half the keys each are regrouped into three
tensors that take every third key. `permute` computes offsets and lengths as each library needs
them, from an input that is made anew each time. torchrec is timed where it can be imported (`pip
install --no-deps torchrec fbgemm-gpu-cpu`, the versions that go with the torch at hand, and what
they import). Rows of results go to benchmarks/results/jagged.csv.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardwise.bench.results import OURS, RESULTS, Results
from shardwise.bench.timing import Times, time_in_turn

CALLS = 1000  # constructions per timed round: one alone is below the clock's noise


def main() -> None:
    """Read the options, and time all operations at every thread count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--keys", type=int, default=26)
    add("--batch", type=int, default=8192)
    add("--pooling", type=int, default=1, help="ids per bag")
    add("--width", type=int, default=64, help="of each key's columns in regroup")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--repeats", type=int, default=30, help="rounds; the median is reported")
    add("--csv", type=Path, help="where rows are added (with --quick: none unless given)")
    add("--quick", action="store_true", help="3 rounds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 3
    elif options.csv is None:
        options.csv = RESULTS / "jagged.csv"
    results = Results(options.csv, "µs")
    libraries = find_libraries()
    sizes = {name: getattr(options, name) for name in ("keys", "batch", "pooling", "width")}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for operation, prepare in OPERATIONS.items():
            runs = {name: prepare(library, options) for name, library in libraries.items()}
            times = time_in_turn(runs, options.repeats)
            if operation == "construct":
                times = {name: Times([s / CALLS for s in t.seconds]) for name, t in times.items()}
            results.add({"operation": operation, **sizes, "threads": threads}, times)


def find_libraries() -> dict[str, Any]:
    """Give the modules with the jagged types; says so where torchrec cannot be imported."""
    libraries = {OURS: importlib.import_module("shardwise.jagged")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            libraries["torchrec"] = importlib.import_module("torchrec.sparse.jagged_tensor")
    except (ImportError, OSError) as error:
        print(f"without torchrec: {error}")
    return libraries


def prepare_construct(library: Any, options: argparse.Namespace) -> Callable[[int], object]:
    """Make many inputs from the same tensors."""
    keys, values, lengths = draw_input(options)
    keyed_jagged = library.KeyedJaggedTensor

    def construct(_: int) -> None:
        for _ in range(CALLS):
            keyed_jagged(keys, values, lengths=lengths)

    return construct


def prepare_permute(library: Any, options: argparse.Namespace) -> Callable[[int], object]:
    """Put the keys into another order, weights absent."""
    keys, values, lengths = draw_input(options)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    keyed_jagged = library.KeyedJaggedTensor
    return lambda _: keyed_jagged(keys, values, lengths=lengths).permute(order)


def prepare_regroup(library: Any, options: argparse.Namespace) -> Callable[[int], object]:
    """Move the columns of two tensors into three."""
    keys, _, _ = draw_input(options)
    half = len(keys) // 2
    inputs = [
        library.KeyedTensor(
            part, [options.width] * len(part), torch.randn(options.batch, options.width * len(part))
        )
        for part in (keys[:half], keys[half:])
    ]
    groups = [keys[start::3] for start in range(3)]
    return lambda _: library.KeyedTensor.regroup(inputs, groups)


def draw_input(options: argparse.Namespace) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Give keys, values and lengths, every bag of one length."""
    generator = torch.Generator().manual_seed(0)
    num_bags = options.keys * options.batch
    values = torch.randint(0, 2**40, (num_bags * options.pooling,), generator=generator)
    lengths = torch.full((num_bags,), options.pooling)
    return [f"key_{i}" for i in range(options.keys)], values, lengths


OPERATIONS = {
    "construct": prepare_construct,
    "permute": prepare_permute,
    "regroup": prepare_regroup,
}


if __name__ == "__main__":
    main()
