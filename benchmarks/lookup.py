"""Pooled lookups on CPU beside `torch.nn.EmbeddingBag` and FBGEMM: forward, and a training step.

The contenders hold the same weights, get the same ids and are checked to agree before they are
timed, in turn, in one process. A training step is forward, backward and an update of the touched
rows. What to know of the peers:

* EmbeddingBag: one module per table, joined by `torch.cat`; row-sparse gradients and an optimizer
  that takes them (of row-wise Adagrad torch has none: ours in plain torch).
* FBGEMM (`pip install --no-deps fbgemm-gpu-cpu`, the version that goes with the torch at hand): its
  CPU wheel runs on one thread whatever is asked, and its tables lie in 4 KB pages unless
  THP_MEM_ALLOC_ENABLE=1 is set before the start, which moves all tensors of torch to 2 MB pages.
  Run the script once with it and once without.
* The probe (where there is g++): only the reads of the forward, and the reads with the writes, from
  our tables and into a new tensor in 2 MB pages. A bound, not a peer.

The default is 26 tables of 300,000 rows of 64 and both workloads. Rows of results go to
benchmarks/results/lookup.csv.
"""

import argparse
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contest.lookups import DTYPES, MAKERS, RULES, Contender, Tables, compile_probe, make_ours
from contest.results import OURS, RESULTS, Results
from contest.timing import time_in_turn
from torch import Tensor

from shardwise.tables.store import allocate

ZIPF_EXPONENT = 1.05
NUM_BATCHES = 4  # taken in turn, so that no round finds the rows of the one before in the cache


@dataclass(frozen=True)
class Workload:
    """Ids of one batch: how many, and how they repeat."""

    batch: int
    pooling: int
    ids: str

    def draw(self, tables: Tables, seed: int) -> Tensor:
        """Draw ids [tables, batch, pooling]; with zipf, each table has hot rows of its own."""
        generator = torch.Generator().manual_seed(seed)
        shape = (tables.num_tables, self.batch, self.pooling)
        if self.ids == "uniform":
            return torch.randint(0, tables.rows, shape, generator=generator)
        shares = torch.arange(1, tables.rows + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
        totals = (shares / shares.sum()).cumsum(0)
        draws = torch.rand(shape, dtype=torch.float64, generator=generator)
        ranks = torch.searchsorted(totals, draws).clamp_(max=tables.rows - 1)
        hot = torch.Generator().manual_seed(0)
        orders = [torch.randperm(tables.rows, generator=hot) for _ in range(tables.num_tables)]
        return torch.stack([order[rank] for order, rank in zip(orders, ranks, strict=True)])


def main() -> None:
    """Read the options, and time all workloads, passes and thread counts."""
    options = read_options()
    results = Results(options.csv, "ms")
    tables = Tables(options.tables, options.rows, options.width, options.dtype, options.rule)
    pages = "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "as shipped"
    contenders = make_contenders(tables, options.peers)
    probe = find_probe(tables) if "probe" in options.peers else None
    check_alike(contenders, Workload(256, 3, "uniform").draw(tables, 0), tables)
    for batch, pooling in options.workloads:
        for ids in options.ids:
            workload = Workload(batch, pooling, ids)
            drawn = [workload.draw(tables, seed) for seed in range(NUM_BATCHES)]
            for name, runs in list_passes(contenders, drawn, tables, probe).items():
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    times = time_in_turn(runs, options.repeats)
                    what = {"pass": name, "threads": threads, "pages": pages}
                    results.add({**vars(tables), **vars(workload), **what}, times)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tables", type=int, default=26, help="how many")
    add("--rows", type=int, default=300_000, help="of each table")
    add("--width", type=int, default=64, help="of each row")
    add("--batch", type=int, help="with --pooling: one workload in place of the two")
    add("--pooling", type=int, help="ids per bag")
    add("--ids", nargs="+", choices=["uniform", "zipf"], default=["uniform", "zipf"])
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--dtype", choices=DTYPES, default="fp32", help="of the rows")
    add("--rule", choices=RULES, default="row_wise_adagrad", help="of the update")
    add("--peers", nargs="*", choices=[*MAKERS, "probe"], default=[*MAKERS, "probe"])
    add("--repeats", type=int, default=12, help="rounds; the median is reported")
    add("--csv", type=Path, help="where rows are added (with --quick: none unless given)")
    add("--quick", action="store_true", help="small tables and 3 rounds, to see that it runs")
    options = parser.parse_args()
    if (options.batch is None) != (options.pooling is None):
        parser.error("--batch and --pooling go together")
    if options.batch is not None:
        options.workloads = [(options.batch, options.pooling)]
    else:
        options.workloads = [(2048, 20), (8192, 1)]
    if options.quick:
        options.rows, options.repeats = min(options.rows, 10_000), 3
    elif options.csv is None:
        options.csv = RESULTS / "lookup.csv"
    return options


def make_contenders(tables: Tables, peers: list[str]) -> dict[str, Contender]:
    """Make ours and those peers that are installed and have the rule and dtype; say which are not.

    Raises:
        MemoryError: Their tables would not fit.
    """
    names = [name for name in MAKERS if name in peers]
    wanted = tables.num_bytes * (1 + len(names))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > free:
        raise MemoryError(
            f"{1 + len(names)} contenders with {tables.num_bytes / 2**30:.1f} GiB of tables each, "
            f"but {free / 2**30:.1f} GiB of memory are free; name fewer --peers, or smaller tables"
        )
    contenders = {OURS: make_ours(tables)}
    for name in names:
        try:
            contender = MAKERS[name](tables)
            forward(contender, torch.zeros(tables.num_tables, 1, 1, dtype=torch.int64))
            contenders[name] = contender
        except (ImportError, AssertionError, NotImplementedError) as error:
            print(f"without {name}: {error}")
    return contenders


def check_alike(contenders: dict[str, Contender], ids: Tensor, tables: Tables) -> None:
    """Give all the weights of ours; refuse to time contenders that then compute something else.

    16-bit rows are rounded at random by an update, so only their forward is compared.
    """
    ours = contenders[OURS]
    grad = torch.randn(ids.shape[1], tables.num_tables * tables.width)
    for name, contender in contenders.items():
        for weight, source in zip(contender.weights, ours.weights, strict=True):
            weight.copy_(source)
        assert_close(name, forward(contender, ids), forward(ours, ids), tables.dtype)
    for contender in contenders.values():
        contender.train(contender.prepare(ids), grad)
    if tables.dtype == "fp32":
        for name, contender in contenders.items():
            assert_close(name, forward(contender, ids), forward(ours, ids), tables.dtype)


def forward(contender: Contender, ids: Tensor) -> Tensor:
    """Look up without autograd."""
    with torch.no_grad():
        return contender.forward(contender.prepare(ids)).float()


def assert_close(name: str, result: Tensor, wanted: Tensor, dtype: str) -> None:
    """Compare root mean squares, which a few gradients near an optimizer's epsilon do not move."""
    most = 1e-2 if dtype == "bf16" else 1e-3
    error = ((result - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert error <= most, f"{name} differs from ours by {error:.1e} of the root mean square"


def find_probe(tables: Tables) -> Callable[..., None] | None:
    """Compile the probe; None, saying so, where that is not possible."""
    try:
        if tables.dtype != "fp32" or tables.width % 16:
            raise OSError("it reads fp32 rows, of a width that 16 divides")
        return compile_probe(tables.width)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"without the probe: {error}")
        return None


def list_passes(
    contenders: dict[str, Contender],
    drawn: list[Tensor],
    tables: Tables,
    probe: Callable[..., None] | None,
) -> dict[str, dict[str, Callable[[int], object]]]:
    """Give what is timed, by pass and contender; each takes the number of the round."""
    passes: dict[str, dict[str, Callable[[int], object]]] = {"forward": {}, "train": {}}
    shape = (drawn[0].shape[1], tables.num_tables * tables.width)
    grad = torch.randn(shape)
    for name, contender in contenders.items():
        calls = [contender.prepare(ids) for ids in drawn]

        def run_forward(i: int, contender: Contender = contender, calls: list[Any] = calls) -> None:
            with torch.no_grad():
                contender.forward(calls[i % NUM_BATCHES])

        def run_train(i: int, contender: Contender = contender, calls: list[Any] = calls) -> None:
            contender.train(calls[i % NUM_BATCHES], grad)

        passes["forward"][name], passes["train"][name] = run_forward, run_train
    if probe is not None:
        weights = contenders[OURS].weights
        passes["forward"] |= {
            "probe: gather": lambda i: probe(weights, drawn[i % NUM_BATCHES], None),
            "probe: gather and write": lambda i: probe(
                weights, drawn[i % NUM_BATCHES], allocate(shape, torch.float32, None)
            ),
        }
    return passes


if __name__ == "__main__":
    main()
