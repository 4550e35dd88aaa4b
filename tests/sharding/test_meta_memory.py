"""Sharding a model on meta needs no more memory than the slices and a little."""

import os
import subprocess
import sys

SCRIPT = """
import resource, sys
import torch, torch.distributed as dist
from shardwise.sharding import column_wise, construct_module_sharding_plan, row_wise
from shardwise.sharding import ShardingEnv, shard
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
tables = [EmbeddingBagConfig(1_250_000, 64, f"t{i}") for i in range(2)]  # 305 MB each
collection = EmbeddingBagCollection(tables, device="meta")
builders = {"t0": row_wise(), "t1": column_wise([1, 0], [60, 4])}
plan = construct_module_sharding_plan(
    collection, builders, world_size=ranks, local_size=ranks, device_type="cpu"
)
env = ShardingEnv.from_process_group(dist.group.WORLD)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shard(collection, plan, env)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
slices = sum(p.numel() * 4 for p in collection.parameters()) / 1024
assert float(next(iter(collection.parameters()))[-1, -1]) != 0
print(slices / 1024, peak / 1024)
dist.destroy_process_group()
"""


def test_no_rank_needs_more_than_its_slices_and_200_mb(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=100)[0].split() for process in processes]
    sizes = [[float(number) for number in numbers] for numbers in printed]
    assert [round(slices) for slices, _ in sizes] == [172, 439]  # of 610 MB
    for slices, peak in sizes:
        assert peak <= slices + 200
