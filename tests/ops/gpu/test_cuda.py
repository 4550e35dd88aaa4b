"""What only a CUDA device can show. `make gpu` runs these; without one they are skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import shardwise as sw
from shardwise.data.random import RandomRecDataset
from shardwise.ops.lookup import RULES
from shardwise.optim import RowWiseAdagrad, in_backward

ROOT = Path(__file__).parent.parent.parent.parent
DEVICE = torch.device(os.environ.get("SHARDWISE_TEST_DEVICE", "cuda"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]


def make_model(seed: int = 0) -> sw.DLRM:
    torch.manual_seed(seed)
    configs = [sw.EmbeddingBagConfig(1000, 16, f"t{i}") for i in range(4)]
    return sw.DLRM(sw.EmbeddingBagCollection(configs), 5, [16], [8, 1])


def make_batches(count: int, batch_size: int = 64) -> list[sw.data.Batch]:
    keys = [f"t{i}" for i in range(4)]
    dataset = RandomRecDataset(
        keys, batch_size, hash_size=1000, ids_per_feature=3, num_dense=5, manual_seed=7,
        num_generated_batches=count, num_batches=count,
    )  # fmt: skip
    return list(dataset)


def train(model: sw.DLRM, device: torch.device, steps: int = 20) -> list[float]:
    """Train in backward and give the losses."""
    model = sw.DLRMTrain(model.to(device))
    tables = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    losses = []
    for batch in make_batches(steps):
        if device.type == "cuda":
            batch = batch.pin_memory()
        optimizer.zero_grad()
        loss, _ = model(batch.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        tables.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def test_dlrm_trains_to_the_losses_of_the_cpu():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    losses = train(make_model(), DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = before
    assert losses == pytest.approx(train(make_model(), torch.device("cpu")), abs=1e-4)


def test_operators_pass_their_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ops.gpu.triton_on_cpu"]
    command += ["-m", "not slow", "tests/ops/test_lookup.py"]
    command += ["tests/ops/test_interaction.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", [rule.name for rule in RULES[2:4]])
def test_two_runs_give_the_same_bits(rule):
    optimizers = {"row_wise_adagrad": RowWiseAdagrad, "adam": torch.optim.Adam}
    results: list[list[Tensor]] = []
    for _ in range(2):
        torch.manual_seed(0)
        bags = sw.EmbeddingBagCollection([sw.EmbeddingBagConfig(50, 64, "t")]).to(DEVICE)
        in_backward(bags, optimizers[rule], lr=0.1)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 50, (100_000,), generator=generator).to(DEVICE)
        lengths = torch.full((1000,), 100, device=DEVICE)
        out = bags(sw.KeyedJaggedTensor(["t"], ids, lengths=lengths)).values()
        out.backward(torch.randn(1000, 64, generator=generator).to(DEVICE))
        results.append([out.detach(), *(p.detach().clone() for p in bags.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_states_move_with_the_tables():
    bags = sw.EmbeddingBagCollection([sw.EmbeddingBagConfig(50, 64, "t")])
    optimizer = in_backward(bags, torch.optim.Adam, lr=0.1)
    bags.to(DEVICE)
    ids = torch.tensor([1, 2, 1], device=DEVICE)
    features = sw.KeyedJaggedTensor(["t"], ids, lengths=torch.tensor([2, 1], device=DEVICE))
    bags(features).values().sum().backward()
    (state,) = optimizer.state_dict()["state"].values()
    assert state["exp_avg"].device.type == DEVICE.type


def test_gradients_at_the_step_equal_those_in_backward():
    results = []
    for when in ("backward", "step"):
        torch.manual_seed(0)
        bags = sw.EmbeddingBagCollection([sw.EmbeddingBagConfig(50, 64, "t")]).to(DEVICE)
        optimizer = in_backward(bags, RowWiseAdagrad, lr=0.1, when=when)
        ids = torch.arange(60, device=DEVICE) % 50
        lengths = torch.full((20,), 3, device=DEVICE)
        bags(sw.KeyedJaggedTensor(["t"], ids, lengths=lengths)).values().sum().backward()
        optimizer.step()
        results.append(next(bags.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_bad_ids_are_named_by_the_next_step():
    bags = sw.EmbeddingBagCollection([sw.EmbeddingBagConfig(50, 64, "t")]).to(DEVICE)
    ids = torch.tensor([1, 50], device=DEVICE)
    features = sw.KeyedJaggedTensor(["t"], ids, lengths=torch.tensor([1, 1], device=DEVICE))
    message = "feature 't', sample 1: id 50 is outside table 't'"
    bags(features)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=message):
        bags(features)


# torch's own tracing uses what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_tables_equal_eager_ones(no_shape_checks):
    model = make_model().to(DEVICE)
    batch = make_batches(1)[0].to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(batch.dense_features, batch.sparse_features),
        model(batch.dense_features, batch.sparse_features),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_step_runs_as_a_cuda_graph():
    torch.manual_seed(0)
    with torch.device(DEVICE):  # the learning rate and the steps lie there, too
        bags = sw.EmbeddingBagCollection([sw.EmbeddingBagConfig(50, 64, "t")])
        in_backward(bags, torch.optim.Adam, lr=0.1)
        ids, lengths = torch.arange(60) % 50, torch.full((20,), 3)
        table = next(bags.parameters())

        def step() -> None:
            bags(sw.KeyedJaggedTensor(["t"], ids, lengths=lengths)).values().sum().backward()

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        before = table.detach().clone()
        graph.replay()
        torch.cuda.synchronize()
    assert not torch.equal(table, before)
    sw.ops.lookup.gpu.raise_bad_ids()


def test_one_rank_shards_over_nccl(tmp_path):
    wanted = train(make_model(), DEVICE, steps=3)
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model().to(DEVICE)
        bags = model.sparse_arch.embedding_bag_collection
        sw.shard(bags, [sw.Slice(f"t{i}", (0, 1000), (0, 16), ranks=(0,)) for i in range(4)])
        assert train(model, DEVICE, steps=3) == pytest.approx(wanted, abs=1e-5)
    finally:
        dist.destroy_process_group()
