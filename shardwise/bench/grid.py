"""The whole comparison of lookups with FBGEMM CPU: workloads, widths, rows, dtypes and rules.

At width 64, fp32, row-wise Adagrad and 26 x 300,000 rows: batch 2,048 and 8,192, pooling 1 and 20,
uniform and Zipf 1.05. Then one factor at a time, with uniform ids, batch 2,048 x 20 and 8,192 x 1:
widths, rows per table, 16-bit rows, rules. Fewer rows or tables where one side's weights and state
would pass 5 GB. Adam and bf16 rows, which FBGEMM refuses on CPU, are beside `EmbeddingBag` and an
optimizer of row-sparse gradients (`torch.optim.SparseAdam`). Every cell runs with FBGEMM as shipped
and with THP_MEM_ALLOC_ENABLE=1, in processes of their own, ours and the peer's in turn. Cells that
the file has from this commit and machine are skipped, so that a grid that was cut short can be
continued.
"""

import multiprocessing
import os
from dataclasses import replace
from itertools import product

from shardwise.bench.contenders import Tables
from shardwise.bench.module import BASE, Workload, measure
from shardwise.bench.options import Options
from shardwise.bench.results import Results

CROSS = [
    Workload(batch, pooling, ids)
    for batch, pooling, ids in product((2048, 8192), (20, 1), ("uniform", "zipf"))
]
ONE_FACTOR = [Workload(2048, 20, "uniform"), Workload(8192, 1, "uniform")]
CELLS: list[tuple[Tables, list[Workload]]] = [
    (BASE, CROSS),
    *((replace(BASE, width=width), ONE_FACTOR) for width in (16, 32, 128)),
    (replace(BASE, width=256, rows=180_000), ONE_FACTOR),
    *((replace(BASE, rows=rows), ONE_FACTOR) for rows in (10_000, 100_000)),
    (replace(BASE, rows=1_000_000, num_tables=18), ONE_FACTOR),
    *((replace(BASE, dtype=dtype), ONE_FACTOR) for dtype in ("fp16", "bf16")),
    *((replace(BASE, rule=rule), ONE_FACTOR) for rule in ("sgd", "adagrad")),
    (replace(BASE, rule="adam", num_tables=20), ONE_FACTOR),
]


def run(results: Results, options: Options) -> None:
    """Run every cell that is missing in the file, in processes with either kind of pages."""
    cells = [(replace(BASE, num_tables=4, rows=10_000), ONE_FACTOR)] if options.quick else CELLS
    last = {"pass": "train", "threads": options.threads[-1]}  # measured last of a workload
    for tables, workloads in cells:
        for pages, thp in (("as shipped", "0"), ("huge", "1")):
            missing = [
                workload
                for workload in workloads
                if not results.has({**vars(tables), **vars(workload), "pages": pages, **last})
            ]
            if not missing:
                continue
            os.environ["THP_MEM_ALLOC_ENABLE"] = thp  # read when a process first allocates
            process = multiprocessing.get_context("spawn").Process(
                target=_run_cell, args=(results, options, tables, missing)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise OSError(f"the cell {tables} ended with status {process.exitcode}")


def _run_cell(
    results: Results, options: Options, tables: Tables, workloads: list[Workload]
) -> None:
    is_refused = tables.rule == "adam" or tables.dtype == "bf16"
    peers = ("torch",) if is_refused else ("fbgemm",)
    measure(results, options, tables, workloads, peers if options.peers else ())
