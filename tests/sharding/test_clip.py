"""One gradient norm, and one answer to overflow, for slices on many ranks."""

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import (
    GradientClipping,
    GradientClippingOptimizer,
    GradScaler,
    KeyedOptimizerWrapper,
    RowWiseAdagrad,
    clip_grad_norm_,
    in_backward,
)
from shardwise.sharding import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    shard,
    table_wise,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

NAMES = ["a", "b", "c", "d"]


def make(**options) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection([EmbeddingBagConfig(6, 4, name) for name in NAMES], **options)


def place(module, world_size):
    builders = {
        "a": row_wise(),
        "b": data_parallel(),
        "c": column_wise([1, 0, 1, 0]),
        "d": table_wise(world_size - 1),
    }
    plan = construct_module_sharding_plan(
        module, builders, world_size=world_size, device_type="cpu"
    )
    return shard(module, plan)


def batch(factor=1.0) -> KeyedJaggedTensor:
    ids = torch.tensor([3, 5, 0, 1, 2, 2, 5, 4])
    return KeyedJaggedTensor(NAMES, ids, lengths=torch.tensor([2, 0, 1, 1, 1, 1, 1, 1]))


def clip_both(rank, world_size, norm_type, is_sparse):
    plain, sharded = make(sparse=is_sparse), place(make(sparse=is_sparse), world_size)
    for module in (plain, sharded):
        module(batch()).values().square().sum().mul(50).backward()
    norms = [clip_grad_norm_(m.parameters(), 0.5, norm_type) for m in (plain, sharded)]
    for store in sharded.stores:
        grad, whole = store.weight.grad, plain.stores[store.key].weight.grad
        if store.weight.numel():
            torch.testing.assert_close(grad.to_dense(), store.cut(whole.to_dense()))
    return [float(norm) for norm in norms]


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_norm_is_that_of_the_plain_model_and_the_same_on_all_ranks(ranks, norm_type, is_sparse):
    (plain, first), (_, second) = ranks(2, clip_both, norm_type, is_sparse)
    assert first == second
    assert first == pytest.approx(plain, rel=1e-6)


def clip_by_optimizer(rank, world_size):
    sharded = place(make(), world_size)
    inner = KeyedOptimizerWrapper(
        dict(sharded.named_parameters()), lambda params: torch.optim.SGD(params, lr=1.0)
    )
    optimizer = GradientClippingOptimizer(inner, GradientClipping.NORM, max_gradient=0.5)
    before = [parameter.detach().clone() for parameter in sharded.parameters()]
    sharded(batch()).values().square().sum().mul(50).backward()
    optimizer.step()
    squares = [
        (new - old).square().sum() * new.slice_owner.is_counted
        for new, old in zip(sharded.parameters(), before, strict=True)
    ]
    return float(sum(squares))


def test_optimizer_that_clips_takes_the_norm_over_all_slices(ranks):
    assert sum(ranks(2, clip_by_optimizer)) == pytest.approx(0.25, rel=1e-4)


class Scaled(nn.Module):
    def __init__(self, world_size) -> None:
        super().__init__()
        self.tables = place(make(), world_size)
        self.dense = nn.Linear(16, 1)

    def forward(self, features, factor) -> torch.Tensor:
        out = self.tables(features).values()
        return (self.dense(out).sum() + (out[:, -4:] * factor).sum()).sum()


def scale(rank, world_size):
    model = Scaled(world_size)
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1, when="step")
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=100)
    changed = []
    for factor in (1.0, float("inf"), 1.0):  # table d, on the last rank alone, overflows
        before = [parameter.detach().clone() for parameter in model.tables.parameters()]
        optimizer.zero_grad()
        scaler.scale(model(batch(), factor)).backward()
        scaler.step(optimizer)
        scaler.update()
        pairs = zip(model.tables.parameters(), before, strict=True)
        changed.append(any(not torch.equal(new, old) for new, old in pairs))
    finite = all(bool(torch.isfinite(p).all()) for p in model.tables.parameters())
    return changed, scaler.get_scale(), finite


def test_overflow_in_one_slice_skips_the_step_on_all_ranks(ranks):
    assert ranks(2, scale) == [([True, False, True], 2.0, True)] * 2


def test_scaler_without_slices_is_that_of_pytorch():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.zeros(2))
