"""The dense part beside sharded tables: by DDP and FSDP2, equal to one plain model."""

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.sharding import (
    ShardingPlan,
    column_wise,
    construct_module_sharding_plan,
    dense_parallel,
    row_wise,
    shard,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

SAMPLES, STEPS = 4, 4


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tables = EmbeddingBagCollection(
            [EmbeddingBagConfig(11, 8, "a"), EmbeddingBagConfig(6, 8, "b")]
        )
        self.dense = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.dense[2].eval()  # so that a batch may be joined of the ranks'

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.dense(self.tables(features).values()).square().mean()


def batches(step: int, ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, 6, (2, SAMPLES), generator=generator) for _ in range(ranks)]


def features(ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["a", "b"], ids.flatten(), lengths=torch.ones(ids.numel()).long())


def train_plain(ranks: int) -> list[float]:
    model = Model(0)
    tables = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        tables.zero_grad()
        dense.zero_grad()
        loss = model(features(torch.cat(batches(step, ranks), 1)))
        loss.backward()
        dense.step()
        losses.append(loss.item())
    return losses


def train_sharded(rank, world_size, how):
    model = Model(0 if rank == 0 else 5)  # that of rank 0 counts, except for the slices
    model.tables.load_state_dict(Model(0).tables.state_dict())
    tables = in_backward(model, RowWiseAdagrad, lr=0.1)
    plan = construct_module_sharding_plan(
        model.tables,
        {"a": row_wise(), "b": column_wise([0, 1], [3, 5])},
        world_size=world_size,
        device_type="cpu",
    )
    shard(model, ShardingPlan({"tables": plan}))
    slices = [parameter.shape for parameter in model.tables.parameters()]
    outer = dense_parallel(model, how)
    assert [parameter.shape for parameter in model.tables.parameters()] == slices
    dense = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        tables.zero_grad()
        dense.zero_grad()
        loss = outer(features(batches(step, world_size)[rank]))
        loss.backward()
        dense.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_are_those_of_the_plain_model(ranks, how):
    losses = zip(*ranks(2, train_sharded, how), strict=True)
    means = [sum(each) / 2 for each in losses]
    assert means == pytest.approx(train_plain(2), rel=1e-5)


def wrap_without_dense(rank, world_size):
    module = EmbeddingBagCollection([EmbeddingBagConfig(6, 8, "a")])
    plan = construct_module_sharding_plan(
        module, {"a": row_wise()}, world_size=world_size, device_type="cpu"
    )
    shard(module, plan)
    return dense_parallel(module) is module


def test_model_without_a_dense_part_stays_as_it_is(ranks):
    assert ranks(2, wrap_without_dense) == [True, True]


class OutOfOrder(nn.Module):
    """Uses its layers in another order than it names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(5)])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for number in (3, 1, 4, 0, 2):
            values = self.layers[number](values).tanh()
        return values.square().mean()


def later_and_first_gradients(rank: int, world_size: int) -> list[tuple[torch.Tensor, ...]]:
    values = torch.randn(4, 7) * (rank + 0.1)
    gradients = []
    for num_backwards in (3, 1):
        torch.manual_seed(0)
        model = dense_parallel(OutOfOrder())
        for _ in range(num_backwards):
            model.zero_grad()
            model(values).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    return list(zip(*gradients, strict=True))


def test_ddp_adds_in_one_order_from_the_first_step_on(ranks):
    for pairs in ranks(3, later_and_first_gradients):
        assert all(later == first for later, first in pairs)
