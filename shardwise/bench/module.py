"""Pooled lookups on CPU beside `torch.nn.EmbeddingBag` and FBGEMM: forward, and a training step.

26 tables of 300,000 rows of 64 under row-wise Adagrad, 20 ids per bag in batches of 2,048 and one
in batches of 8,192, uniform and under Zipf's law. The contenders hold the same weights, get the
same ids and are checked to agree before they are timed, in turn, in one process. A training step is
forward, backward and an update of the touched rows. What to know of the peers:

* EmbeddingBag: one module per table, joined by `torch.cat`; row-sparse gradients and an optimizer
  that takes them (of row-wise Adagrad torch has none: ours in plain torch).
* FBGEMM (`pip install --no-deps fbgemm-gpu-cpu`, the version that goes with the torch at hand): its
  CPU wheel runs on one thread whatever is asked, and its tables lie in 4 KB pages unless
  THP_MEM_ALLOC_ENABLE=1 is set before the start, which moves all tensors of torch to 2 MB pages.
* The probe (where there is g++): only the reads of the forward, and the reads with the writes into
  memory that was used before, from our tables. A bound, not a peer.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.bench import probe
from shardwise.bench.contenders import MAKERS, Contender, Tables, make_ours
from shardwise.bench.options import Options
from shardwise.bench.results import OURS, Results
from shardwise.bench.timing import time_in_turn
from shardwise.tables.store import allocate

ZIPF_EXPONENT = 1.05
NUM_BATCHES = 4  # taken in turn, so that no round finds the rows of the one before in the cache

Runs = dict[str, Callable[[int], object]]
"""What is timed, by contender; each takes the number of the round."""


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


BASE = Tables(26, 300_000, 64, "fp32", "row_wise_adagrad")
WORKLOADS = [Workload(b, p, ids) for b, p in ((2048, 20), (8192, 1)) for ids in ("uniform", "zipf")]


def run(results: Results, options: Options) -> None:
    """Time the workloads on the tables above, beside all peers and the probe."""
    tables = Tables(4, 10_000, 64, "fp32", "row_wise_adagrad") if options.quick else BASE
    peers = (*MAKERS, "probe") if options.peers else ()
    measure(results, options, tables, WORKLOADS, peers)


def measure(
    results: Results,
    options: Options,
    tables: Tables,
    workloads: Sequence[Workload],
    peers: Sequence[str],
) -> None:
    """Time forward and training of workloads on tables of one size, beside peers and the probe.

    Raises:
        MemoryError: The tables of all would not fit.
    """
    pages = "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "as shipped"
    contenders = make_contenders(tables, peers)
    check_alike(contenders, Workload(256, 3, "uniform").draw(tables, 0), tables)
    for workload in workloads:
        drawn = [workload.draw(tables, seed) for seed in range(NUM_BATCHES)]
        passes = list_passes(contenders, drawn, tables)
        if "probe" in peers:
            passes["forward"] |= list_probes(contenders[OURS].weights, drawn)
        for name, runs in passes.items():
            for threads in options.threads:
                torch.set_num_threads(threads)
                what = {"pass": name, "threads": threads, "pages": pages}
                times = time_in_turn(runs, options.repeats)
                results.add({**vars(tables), **vars(workload), **what}, times)


def make_contenders(tables: Tables, peers: Sequence[str]) -> dict[str, Contender]:
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
            f"but {free / 2**30:.1f} GiB of memory are free; try --quick"
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


def list_passes(
    contenders: dict[str, Contender], drawn: list[Tensor], tables: Tables
) -> dict[str, Runs]:
    """Give the forwards and the training steps of all contenders on the ids drawn."""
    passes: dict[str, Runs] = {"forward": {}, "train": {}}
    grad = torch.randn(drawn[0].shape[1], tables.num_tables * tables.width)
    for name, contender in contenders.items():
        calls = [contender.prepare(ids) for ids in drawn]

        def run_forward(i: int, contender: Contender = contender, calls: list[Any] = calls) -> None:
            with torch.no_grad():
                contender.forward(calls[i % NUM_BATCHES])

        def run_train(i: int, contender: Contender = contender, calls: list[Any] = calls) -> None:
            contender.train(calls[i % NUM_BATCHES], grad)

        passes["forward"][name], passes["train"][name] = run_forward, run_train
    return passes


def list_probes(weights: list[Tensor], drawn: list[Tensor]) -> Runs:
    """Give the probe's reads, alone and with writes; none, saying so, where it cannot be had."""
    out = allocate((drawn[0].shape[1], len(weights) * weights[0].shape[1]), torch.float32, None)
    runs: Runs = {
        "probe: gather": lambda i: probe.gather(weights, drawn[i % NUM_BATCHES], None),
        "probe: gather and write": lambda i: probe.gather(weights, drawn[i % NUM_BATCHES], out),
    }
    try:
        for body in runs.values():
            body(0)
    except (OSError, ValueError) as error:
        print(f"without the probe: {error}")
        return {}
    return runs
