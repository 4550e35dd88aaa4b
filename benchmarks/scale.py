"""How sharding scales on paper: one rank of 8, 128 and 1,024, the others only imagined.

torch's `fake` process group stands for the others. 200 tables of 100,000 rows of 64, made on
`meta`, one id per sample and table, 512 samples per rank. What the other ranks would send is made
up: from each of them what this rank sends itself, which is of the expected size, and zeros for
vectors. Shown are the time of `shard`, the time of a training step (row-wise Adagrad in backward)
without the lookups and updates themselves, which depend on what a rank holds and not on how many
ranks there are, and without making messages up, and the peak of this process's memory. Rows of
results go to benchmarks/results/scale.csv.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from shardwise.bench.results import RESULTS, Results
from shardwise.bench.timing import Times
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.sharding import builders, construct_module_sharding_plan, shard
from shardwise.sharding.environment import ShardingEnv, equal_hosts
from shardwise.sharding.wire import Wire

NUM_TABLES = 200
ROWS, WIDTH, BATCH, LOCAL_SIZE = 100_000, 64, 512, 8
PLACEMENTS = ("table_wise", "row_wise", "table_row_wise", "grid")
RELAYED = "SCALE_RELAYED"  # whether other hosts send only through their rank of our number
KERNELS = ("lookup", "update_", "row_sums", "row_grads")

seconds_made_up: list[float] = []  # that `imagined` took within a step


def main() -> None:
    """Read the options; measure each placement and number of ranks in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    add("--ranks", nargs="+", type=int, default=[8, 128, 1024])
    add("--repeats", type=int, default=12, help="steps that count; their median is reported")
    add("--csv", type=Path, default=RESULTS / "scale.csv", help="where rows are added")
    add("--quick", action="store_true", help="3 steps, no file: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.csv = 3, None
    for placement in options.placements:
        for world_size in options.ranks:
            arguments = (placement, world_size, options)
            process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
            process.start()
            process.join()


def run(placement: str, world_size: int, options: argparse.Namespace) -> None:
    """Measure one placement for one number of ranks."""
    torch.set_num_threads(1)
    os.environ[RELAYED] = str(int(placement != "table_wise"))
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    names = [f"t{i}" for i in range(NUM_TABLES)]
    tables = [EmbeddingBagConfig(ROWS, WIDTH, name, feature_names=[name]) for name in names]
    collection = EmbeddingBagCollection(tables, device="meta")
    in_backward(collection, RowWiseAdagrad, lr=0.01)
    before = peak_bytes()
    Wire.all_to_all = imagined  # type: ignore[method-assign, assignment]
    Wire.broadcast = lambda self, tensor, **_: tensor  # type: ignore[method-assign]
    Wire.gather_texts = lambda self, text: [text] * self.world_size  # type: ignore[method-assign]
    start = time.perf_counter()
    hosts = equal_hosts(world_size, LOCAL_SIZE)
    plan = construct_module_sharding_plan(
        collection,
        {name: build(placement, i, world_size) for i, name in enumerate(names)},
        local_size=LOCAL_SIZE,
        world_size=world_size,
        device_type="cpu",
    )
    env = ShardingEnv(world_size, 0, dist.group.WORLD, hosts=hosts)
    shard(collection, plan, env)
    sharding = time.perf_counter() - start
    peak = peak_bytes() - before
    held = sum(parameter.nbytes for parameter in collection.parameters())
    ids = torch.randint(0, ROWS, (NUM_TABLES * BATCH,), dtype=torch.int32)
    lengths = torch.ones(NUM_TABLES * BATCH, dtype=torch.int32)
    steps, kernels = time_steps(
        collection, lambda: KeyedJaggedTensor(names, ids, lengths=lengths), options.repeats
    )
    results = Results(options.csv, "ms")
    what = {"placement": placement, "ranks": world_size, "batch": BATCH}
    results.add({**what, "what": "host side of a step"}, {"shardwise": Times(steps)})
    results.add({**what, "what": "lookups and updates of a step"}, {"shardwise": Times(kernels)})
    results.add({**what, "what": "shard"}, {"shardwise": Times([sharding, sharding])})
    results.add_size({**what, "what": "slices held"}, "shardwise", held)
    results.add_size({**what, "what": "peak while sharding"}, "shardwise", peak)


def time_steps(
    collection: EmbeddingBagCollection, draw: Callable[[], KeyedJaggedTensor], repeats: int
) -> tuple[list[float], list[float]]:
    """Give the seconds of steps without, and of, the operators that look rows up and update them.

    Args:
        collection: Sharded.
        draw: Makes the input of a step.
        repeats: Steps that count.
    """
    steps, kernels = [], []
    for i in range(2 + repeats):
        features = draw()
        seconds_made_up.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            out = collection(features).values()
            out.backward(torch.ones_like(out))
            elapsed = time.perf_counter() - start - sum(seconds_made_up)
        own = [event for event in profile.key_averages() if event.key.startswith("shardwise::")]
        inside = sum(e.cpu_time_total for e in own if e.key.split("::")[1] in KERNELS) / 1e6
        if i >= 2:
            steps.append(elapsed - inside)
            kernels.append(inside)
    return steps, kernels


def build(placement: str, table: int, world_size: int) -> Any:
    """Give the placement of one table, spread over ranks and hosts; rank 0 has the first."""
    num_hosts = world_size // LOCAL_SIZE
    if placement == "table_wise":
        return builders.table_wise(rank=table * world_size // NUM_TABLES % world_size)
    if placement == "table_row_wise":
        return builders.table_row_wise(host_index=table % num_hosts)
    if placement == "grid":
        return builders.grid_shard(host_indexes=[table % num_hosts, (table + 1) % num_hosts])
    return builders.row_wise()


def imagined(
    self: Wire,
    send: Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    *,
    tag: str,
    lane: str,
    **_: bool,
) -> "Done":
    """Give what this rank sends itself from everyone, or zeros for vectors."""
    start = time.perf_counter()
    own = send[sum(send_sizes[: self.rank]) :][: send_sizes[self.rank]]
    by_relay = len(self.hosts) > 1 and os.environ[RELAYED] == "1"
    parts = []
    for rank, size in enumerate(receive_sizes):
        sends = lane == "ids" and size == len(own) and not (by_relay and rank % LOCAL_SIZE)
        parts.append(own if sends else send.new_zeros(size, *send.shape[1:]))
    done = Done(torch.cat(parts))
    seconds_made_up.append(time.perf_counter() - start)
    return done


class Done:
    """A message that is here."""

    def __init__(self, received: Tensor) -> None:
        """Keep it."""
        self._received = received

    def wait(self) -> Tensor:
        """Give it."""
        return self._received


def peak_bytes() -> int:
    """Give the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
