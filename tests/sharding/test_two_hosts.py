"""Two hosts, which are two network namespaces with a cable between them, under torchrun.

Run as a script, by torchrun, this module is one rank: it trains tables that are cut by rows over
the ranks of one host, and then looks ids up until something goes wrong.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.sharding import ShardingEnv, construct_module_sharding_plan, shard, table_row_wise
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation
CABLE, RANKS_PER_HOST, TIMEOUT_S = "cable", 2, 5.0
ROWS, WIDTH, BATCH = 50, 8, 6


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def two_hosts():
    if shutil.which("ip") is None:
        pytest.skip("no command ip, of iproute2, to make network namespaces")
    names = [f"shardwise-{os.getpid()}-{number}" for number in range(2)]
    ends = [["name", CABLE, "netns", name] for name in names]
    try:
        made = [ip("netns", "add", name) for name in names]
        made.append(ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1]))
        for name, address in zip(names, ADDRESSES, strict=True):
            made.append(ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE))
            made += [ip("-n", name, "link", "set", device, "up") for device in (CABLE, "lo")]
        if any(command.returncode for command in made):
            said = " ".join(command.stderr.strip() for command in made)
            pytest.skip(f"network namespaces are not allowed here: {said}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@contextlib.contextmanager
def torchrun(names, folder):
    """Start the ranks of both hosts; end them all in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    shape = [f"--nnodes={len(names)}", f"--nproc-per-node={RANKS_PER_HOST}"]
    agents = []
    for number, name in enumerate(names):
        where = [f"--node-rank={number}", f"--master-addr={ADDRESSES[0]}", "--master-port=29500"]
        command = [sys.executable, "-m", "torch.distributed.run", *shape, *where]
        command = ["ip", "netns", "exec", name, *command, "-m", __spec__.name, str(folder)]
        with Path(folder / f"host-{number}").open("w") as log:
            agents.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=Path(__file__).parents[2],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    try:
        yield agents
    finally:
        for agent in agents:
            # Each rank is a session of its own, which the agent ends.
            os.killpg(agent.pid, signal.SIGTERM)
            agent.wait()


def read_of_all_ranks(folder, kind, agents, timeout_s):
    """Wait until each rank has written a file of a kind, and give the contents."""
    paths = [folder / f"{kind}-{rank}" for rank in range(len(agents) * RANKS_PER_HOST)]
    deadline = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        logs = [path.read_text() for path in sorted(folder.glob("host-*"))]
        assert all(agent.poll() is None for agent in agents), logs
        assert time.monotonic() < deadline, (kind, sorted(folder.iterdir()), logs)
        time.sleep(0.05)
    return [path.read_text() for path in paths]


def test_hosts_train_as_one_process_and_a_host_that_is_cut_off_is_named(two_hosts, tmp_path):
    with torchrun(two_hosts, tmp_path) as agents:
        differences = read_of_all_ranks(tmp_path, "difference", agents, 120)
        assert max(map(float, differences)) < 1e-6
        ip("-n", two_hosts[1], "link", "set", CABLE, "down")
        errors = read_of_all_ranks(tmp_path, "error", agents, TIMEOUT_S + 20)
    for rank, error in enumerate(errors):
        host = rank // RANKS_PER_HOST
        others = [other for other in range(4) if other // RANKS_PER_HOST != host]
        assert "of the collection (tables bags_here, bags_there) failed" in error
        for other in others:
            assert f"rank {other} on host {1 - host} gives no sign of life" in error


# ---- a rank


def make_bags():
    configs = [
        EmbeddingBagConfig(ROWS, WIDTH, name, feature_names=[feature])
        for name, feature in (("bags_here", "f"), ("bags_there", "g"))
    ]
    bags = EmbeddingBagCollection(configs)
    bags.reset_parameters()
    in_backward(bags, RowWiseAdagrad, lr=0.1)
    return bags


def make_batch(ranks, step):
    """The batches of some ranks, one after another."""
    draws = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (2, 4, BATCH), generator=draws)
    ids = torch.randint(ROWS, (int(lengths.sum()),), generator=draws)
    pieces = ids.split(lengths.sum(2).flatten().tolist())
    chosen = [pieces[4 * feature + rank] for feature in range(2) for rank in ranks]
    return KeyedJaggedTensor(["f", "g"], torch.cat(chosen), lengths=lengths[:, ranks].flatten())


def loss_of(bags, ranks, step):
    values = bags(make_batch(ranks, step)).values().view(len(ranks), -1)
    return (values * torch.linspace(-1, 1, values.shape[1])).mean()


def put_by_rows(bags, env):
    builders = {"bags_here": table_row_wise(0), "bags_there": table_row_wise(1)}
    plan = construct_module_sharding_plan(
        bags, builders, local_size=RANKS_PER_HOST, world_size=env.world_size
    )
    return shard(bags, plan, env)


def train_both_ways(rank, world_size):
    """Give the largest difference between the sharded tables and those of one process."""
    torch.manual_seed(0)
    plain = make_bags()
    torch.manual_seed(0)
    sharded = put_by_rows(make_bags(), ShardingEnv.from_process_group(dist.group.WORLD))
    for step in range(3):
        loss_of(sharded, [rank], step).backward()
        loss_of(plain, list(range(world_size)), step).backward()
    found = sharded.state_dict()
    return max(
        float((value - found[name].full()).abs().max())
        for name, value in plain.state_dict().items()
        if name.endswith(".weight")
    )


def write(path, value):
    """Write a file that is there only once it is complete."""
    path.with_suffix(".new").write_text(str(value))
    path.with_suffix(".new").rename(path)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    bags = put_by_rows(make_bags(), ShardingEnv.from_process_group(group))
    write(folder / f"difference-{rank}", train_both_ways(rank, dist.get_world_size()))
    try:
        while True:
            bags(make_batch([rank], 0))
    except RuntimeError as error:
        write(folder / f"error-{rank}", error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
