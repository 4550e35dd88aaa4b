"""Training steps of a DLRM in one process, beside TorchRec's: milliseconds of the processor.

26 tables with the cardinalities of Criteo's Kaggle set (at most a million rows each), width 64, one
id per feature, batch 2,048; MLPs 512-256-64 and 512-512-256-1; row-wise Adagrad in backward, SGD
for the rest. TorchRec's model is sharded over one process, which is how its update is fused. Beside
it are our tables in TorchRec's dense code (`same dense`), ours as a whole, and of it the tables
alone (`tables`: lookup, gradient and update). Time is that of all threads.
"""

import socket
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist

from shardwise.bench import dlrm
from shardwise.bench.options import Options
from shardwise.bench.results import OURS, Results
from shardwise.bench.timing import time_in_turn

NUM_BATCHES = 4


def run(results: Results, options: Options) -> None:
    """Time the steps of all models in turn, at every thread count."""
    batch, most_rows = (64, 1000) if options.quick else (2048, dlrm.MOST_ROWS)
    steps = {OURS: make_ours(most_rows), "tables": make_tables(most_rows)}
    try:
        if options.peers:
            steps["same dense"] = make_ours(most_rows, import_module("torchrec.models.dlrm").DLRM)
            steps["torchrec"] = make_torchrec()
    except (ImportError, OSError) as error:
        print(f"without torchrec: {error}")
    batches = [dlrm.draw(batch, seed, most_rows) for seed in range(NUM_BATCHES)]
    for threads in options.threads:
        torch.set_num_threads(threads)
        runs = {name: partial(_step, step, batches) for name, step in steps.items()}
        times = time_in_turn(runs, options.repeats, warmups=4, clock=time.process_time)
        results.add({"model": "DLRM", "batch": batch, "threads": threads}, times)
    if dist.is_initialized():
        dist.destroy_process_group()


def _step(step: Callable[[dlrm.Batch], object], batches: list[dlrm.Batch], i: int) -> None:
    step(batches[i % NUM_BATCHES])


def make_ours(most_rows: int, model_type: type | None = None) -> Callable[[dlrm.Batch], object]:
    """Give the step of a model of one process, of our DLRM or another around our tables."""
    library = dlrm.ours()
    bags = dlrm.make_bags(library, torch.device("cpu"), most_rows)
    model = (model_type or library.models.DLRM)(bags, dlrm.NUM_DENSE, *dlrm.LAYERS)
    tables = set(bags.parameters())
    owned = {name for name, parameter in model.named_parameters() if parameter in tables}
    return dlrm.train(library, model, owned)


def make_tables(most_rows: int) -> Callable[[dlrm.Batch], object]:
    """Give the tables' share of a step."""
    library = dlrm.ours()
    bags = dlrm.make_bags(library, torch.device("cpu"), most_rows)

    def step(batch: dlrm.Batch) -> None:
        _, ids, labels = batch
        lengths = torch.ones(ids.numel(), dtype=torch.int32)
        features = library.sparse.KeyedJaggedTensor(dlrm.NAMES, ids.flatten(), lengths=lengths)
        values = bags(features).values()
        values.backward(torch.full_like(values, 1 / labels.numel()))

    return step


def make_torchrec() -> Callable[[dlrm.Batch], object]:
    """Give TorchRec's step, in a process group of one."""
    library = dlrm.torchrec()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    return dlrm.make_step(library, "table_wise", 1)
