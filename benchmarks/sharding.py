"""A sharded DLRM on two gloo processes beside TorchRec's, in each placement.

Both libraries run in the same two processes, a step of one after a step of the other: a DLRM with
the cardinalities of Criteo's Kaggle set (at most a million rows a table), width 64, MLPs 512-256-64
and 512-512-256-1, one id per feature, tables updated in backward by row-wise Adagrad, the dense
part in DDP. TorchRec's sharder refuses some placements on CPU and is told to take them.

Time is that of rank 0's step: on the wall, and of its processor, all threads of the process. Bytes
are what rank 0 sends to others for the embeddings, counted at torch.distributed by one counter for
both. Rows of results go to benchmarks/results/sharding.csv.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise.bench.dlrm import LIBRARIES, PLACEMENTS, counted_bytes, draw, make_step
from shardwise.bench.results import OURS, RESULTS, Results
from shardwise.bench.timing import Times

WORLD_SIZE = 2
NUM_BATCHES = 4


def main() -> None:
    """Read the options and start the processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    add("--peers", nargs="*", choices=[n for n in LIBRARIES if n != OURS], default=["torchrec"])
    add("--batch", type=int, default=2048, help="per process")
    add("--repeats", type=int, default=12, help="steps that count; their median is reported")
    add("--csv", type=Path, default=RESULTS / "sharding.csv", help="where rows are added")
    add("--quick", action="store_true", help="3 steps, no file: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.csv = 3, None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for placement in options.placements:  # processes of its own: memory is given back
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=run, args=(rank, port, placement, options))
            for rank in range(WORLD_SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def run(rank: int, port: int, placement: str, options: argparse.Namespace) -> None:
    """Time one placement on one rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD_SIZE)
    steps = {}
    for name in (OURS, *options.peers):
        try:
            steps[name] = make_step(LIBRARIES[name](), placement, WORLD_SIZE)
        except ImportError as error:
            print(f"without {name}: {error}")
    batches = [draw(options.batch, WORLD_SIZE * i + rank) for i in range(NUM_BATCHES)]
    wall, processor, sent = alternate(steps, batches, options.repeats)
    if rank == 0:
        results = Results(options.csv, "ms")
        what = {"placement": placement, "ranks": WORLD_SIZE, "batch": options.batch}
        results.add({**what, "time": "wall"}, wall)
        results.add({**what, "time": "processor"}, processor)
        for name, size in sent.items():
            samples = WORLD_SIZE * options.batch / wall[name].median
            print(f"  {name:24} {samples:10.0f} samples/s")
            results.add_size({**what, "time": "sent by rank 0 per step"}, name, size)
    dist.destroy_process_group()


def alternate(
    steps: dict[str, Any], batches: list[Any], repeats: int
) -> tuple[dict[str, Times], dict[str, Times], dict[str, int]]:
    """Step with each library in turn; all ranks start a step together.

    Returns:
        By library, times on the wall and of the processor, and the median of bytes sent.
    """
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    sizes: dict[str, list[int]] = {name: [] for name in steps}
    for i in range(3 + repeats):
        for name, step in steps.items():
            dist.barrier()
            with counted_bytes() as sent:
                start, used = time.perf_counter(), time.process_time()
                step(batches[i % NUM_BATCHES])
                elapsed, used = time.perf_counter() - start, time.process_time() - used
            if i >= 3:
                wall[name].append(elapsed)
                processor[name].append(used)
                sizes[name].append(sent[0])
    medians = {name: round(statistics.median(each)) for name, each in sizes.items()}
    walls = {name: Times(each) for name, each in wall.items()}
    return walls, {name: Times(each) for name, each in processor.items()}, medians


if __name__ == "__main__":
    main()
