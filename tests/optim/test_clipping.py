"""Clipping: torch's result where torch has one, row-sparse gradients, slices on several ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardwise.optim import (
    GradientClipping,
    GradientClippingOptimizer,
    KeyedOptimizerWrapper,
    clip_grad_norm_,
)

INFINITY = float("inf")


def with_gradients(*gradients):
    params = []
    for gradient in gradients:
        param = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
        param.grad = gradient
        params.append(param)
    return params


def row_sparse(rows, values, num_rows=5):
    indices = torch.tensor([rows], dtype=torch.int64)
    return torch.sparse_coo_tensor(
        indices, values, (num_rows, values.shape[1]), check_invariants=True
    )


def clipping_optimizer(params, **options):
    named = {str(number): param for number, param in enumerate(params)}
    inner = KeyedOptimizerWrapper(named, lambda tensors: torch.optim.SGD(tensors, lr=1.0))
    return GradientClippingOptimizer(inner, **options)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INFINITY])
@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
def test_dense_gradients_are_clipped_as_by_torch(norm_type, max_norm):
    ours = with_gradients(torch.randn(3, 4), torch.randn(7))
    theirs = with_gradients(*(param.grad.clone() for param in ours))
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INFINITY])
def test_row_sparse_gradients_count_and_scale_as_dense_ones(norm_type):
    sparse = row_sparse([3, 1, 3], torch.randn(3, 2))
    ours = with_gradients(torch.randn(4), sparse.clone())
    theirs = with_gradients(ours[0].grad.clone(), sparse.to_dense())
    norm = clip_grad_norm_(ours, 0.5, norm_type)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type))
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad.to_dense(), theirs[1].grad)


def test_repeated_rows_are_summed_before_the_norm():
    (param,) = with_gradients(row_sparse([2, 2], torch.tensor([[3.0], [-3.0]])))
    assert clip_grad_norm_([param], 1.0) == 0
    (param,) = with_gradients(row_sparse([2, 2], torch.tensor([[3.0], [1.0]])))
    assert clip_grad_norm_([param], 2.0) == 4
    assert param.grad.to_dense()[2].item() == pytest.approx(2.0, rel=1e-6)


def test_coefficient_is_max_over_norm_plus_1e_6_and_at_most_1():
    small = with_gradients(torch.tensor([3e-6, 4e-6], dtype=torch.float64))
    clip_grad_norm_(small, 2e-6)
    assert small[0].grad.tolist() == pytest.approx([1e-6, 4e-6 / 3], rel=1e-9)
    unclipped = with_gradients(torch.tensor([3.0, 4.0]))
    clip_grad_norm_(unclipped, 5.1)
    assert unclipped[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_half_gradients_is_in_float32(dtype):
    params = with_gradients(torch.full((16,), 3e4, dtype=dtype), torch.ones(2))
    norm = clip_grad_norm_(params, 1.0)  # past the largest float16
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(1.2e5, rel=1e-2)
    assert params[0].grad.dtype == dtype
    assert params[0].grad[0].item() == pytest.approx(0.25, rel=1e-2)


def test_parameters_without_gradient_or_elements_add_nothing():
    bare = nn.Parameter(torch.ones(3))
    empty_rows = row_sparse([], torch.empty(0, 2))
    params = [bare, *with_gradients(torch.zeros(0), empty_rows, torch.tensor([3.0, 4.0]))]
    for norm_type in (2.0, INFINITY):
        assert clip_grad_norm_(params, 10.0, norm_type) == (5.0 if norm_type == 2.0 else 4.0)
    assert bare.grad is None
    assert clip_grad_norm_([], 1.0) == 0
    assert clip_grad_norm_([bare], 1.0) == 0


def test_one_tensor_or_a_generator_will_do():
    (param,) = with_gradients(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_(param, 10.0) == 5
    assert clip_grad_norm_((p for p in [param]), 10.0) == 5


def test_norm_that_is_not_finite_is_returned():
    params = with_gradients(torch.tensor([1.0, math.inf]))
    assert clip_grad_norm_(params, 1.0) == INFINITY


@pytest.mark.parametrize(
    ("max_norm", "norm_type", "message"),
    [
        (-1.0, 2.0, "max_norm must be at least 0, got -1.0"),
        (math.nan, 2.0, "max_norm must be at least 0, got nan"),
        (1.0, 0.0, "norm_type must be above 0, got 0.0"),
        (1.0, -INFINITY, "norm_type must be above 0, got -inf"),
    ],
)
def test_limits_that_cannot_work_are_refused(max_norm, norm_type, message):
    params = with_gradients(torch.tensor([3.0]))
    with pytest.raises(ValueError, match=f"clip_grad_norm_: {message}"):
        clip_grad_norm_(params, max_norm, norm_type)
    with pytest.raises(ValueError, match="GradientClippingOptimizer: "):
        clipping_optimizer(params, max_gradient=max_norm, norm_type=norm_type)
    assert params[0].grad.tolist() == [3.0]


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        (GradientClipping.NONE, [-3.0, 0.0, -4.0, 0.25]),
        (GradientClipping.NORM, [-0.6, 0.0, -0.8, 0.05]),
        (GradientClipping.VALUE, [-1.0, 0.0, -1.0, 0.25]),
    ],
)
def test_optimizer_clips_before_the_step(clipping, expected):
    sparse = row_sparse([0, 0, 1], torch.tensor([[1.0], [3.0], [-0.25]]), num_rows=2)
    params = with_gradients(torch.tensor([3.0, 0.0]), sparse)
    clipping_optimizer(params, clipping=clipping, max_gradient=1.0).step()
    updated = torch.cat([param.detach().flatten() for param in params])
    torch.testing.assert_close(updated, torch.tensor(expected), rtol=5e-3, atol=1e-6)


def test_optimizer_clips_the_gradients_of_its_closure():
    (param,) = with_gradients(torch.zeros(2))
    optimizer = clipping_optimizer([param], clipping=GradientClipping.VALUE, max_gradient=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (param * torch.tensor([4.0, 0.25])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert param.tolist() == [-0.5, -0.25]


def test_optimizer_takes_the_infinity_norm_by_name():
    (param,) = with_gradients(torch.tensor([3.0, 4.0]))
    optimizer = clipping_optimizer(
        [param], clipping=GradientClipping.NORM, max_gradient=2.0, norm_type="inf"
    )
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-1.5, -2.0]), rtol=1e-5, atol=0)


def clip_slices(rank, world_size, norm_type, enabled):
    """Clip a table of which each rank holds a slice, one of them empty, and a replica."""
    table = torch.arange(1.0, 7.0).reshape(6, 1)
    slices = [row_sparse([0, 0], table[:1].repeat(2, 1), 6), table[1:], table[:0]]
    local, replica = with_gradients(slices[rank], torch.tensor([2.0]))
    if rank == 2:
        local.grad = None
    owners = dist.new_group(list(range(world_size)))
    optimizer = clipping_optimizer(
        [local, replica],
        clipping=GradientClipping.NORM,
        max_gradient=1.0,
        norm_type=norm_type,
        enable_global_grad_clip=enabled,
        param_to_pgs={local: [owners]},
    )
    optimizer.step()
    return replica.detach()


@pytest.mark.parametrize("norm_type", [2.0, INFINITY])
def test_norm_over_ranks_counts_slices_once_and_replicas_once(ranks, norm_type):
    whole = torch.tensor([2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 2.0])  # the repeated row sums to 2
    expected = -2.0 / torch.linalg.vector_norm(whole, norm_type)
    for replica in ranks(3, clip_slices, norm_type, True):
        torch.testing.assert_close(replica, expected.reshape(1), rtol=1e-5, atol=0)


def test_norm_stays_on_the_rank_unless_the_global_one_is_asked(ranks):
    first, _, last = ranks(3, clip_slices, 2.0, False)
    assert first.item() == pytest.approx(-2 / math.sqrt(2**2 + 2**2), rel=1e-5)
    assert last.item() == pytest.approx(-1.0, rel=1e-5)


def clip_dtensor(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.tensor([2.0, 3.0, 6.0]), mesh, [Shard(0)])
    (plain,) = with_gradients(torch.tensor([0.0, 24.0]))
    norm = clip_grad_norm_([plain, param], 5.0)
    return norm, param.grad.full_tensor(), plain.grad


def test_sharded_dense_parameters_count_whole(ranks):
    for norm, gradient, plain in ranks(2, clip_dtensor):
        assert norm == 25
        torch.testing.assert_close(gradient, torch.tensor([0.4, 0.6, 1.2]))
        torch.testing.assert_close(plain, torch.tensor([0.0, 4.8]))
