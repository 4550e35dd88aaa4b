import pytest
import torch

from shardwise.ops.library import is_compiled
from shardwise.ops.regroup import reference, regroup

# (tensor, first column, width): neighbours, repeats across and within groups, an empty group,
# a block that covers part of an earlier one, columns never used.
GROUPS = [[(0, 0, 3), (1, 2, 3), (1, 0, 2)], [], [(0, 0, 3), (0, 0, 3)], [(0, 2, 4), (0, 6, 0)]]
BLOCKS = [number for group in GROUPS for block in group for number in block]
SIZES = [len(group) for group in GROUPS]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def make(rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(rows, width).to(dtype).requires_grad_() for width in (7, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 63, 1000])
def test_regroup_and_its_gradient_equal_the_reference(rows: int, dtype: torch.dtype) -> None:
    values = make(rows, dtype)
    fast, plain = regroup(values, GROUPS), reference.regroup(values, BLOCKS, SIZES)
    grads = [torch.randn_like(group) for group in plain]
    expected = reference.regroup_grad(grads, BLOCKS, SIZES, [7, 5])
    for left, right in zip(fast, plain, strict=True):
        assert torch.equal(left, right)
        assert left.is_contiguous()
    for left, right in zip(torch.autograd.grad(fast, values, grads), expected, strict=True):
        assert torch.equal(left, right)


def test_wide_results_past_the_cache_equal_the_reference() -> None:
    values = [torch.randn(8192, 1040), torch.randn(8192, 64)]
    groups = [[(0, 528, 512), (1, 0, 64), (0, 0, 512)]]
    blocks = [number for block in groups[0] for number in block]
    assert torch.equal(regroup(values, groups)[0], reference.regroup(values, blocks, [3])[0])


def test_half_gradients_are_rounded_as_torch_rounds() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite()].reshape(-1, 1)
    other = every[torch.randperm(len(every))]
    summed = torch.ops.shardwise.regroup_grad([every, other], [0, 0, 1, 0, 0, 1], [1, 1], [1])
    assert torch.equal(summed[0], every + other)


def test_mixed_dtypes_are_promoted() -> None:
    values = [torch.ones(2, 1, dtype=torch.float16), torch.ones(2, 1)]
    assert regroup(values, [[(0, 0, 1), (1, 0, 1)]])[0].dtype == torch.float32


def test_columns_of_a_larger_tensor_are_taken() -> None:
    values = torch.arange(12.0).reshape(3, 4)[:, 1:3]
    assert regroup([values], [[(0, 1, 1)]])[0].flatten().tolist() == [2, 6, 10]


def test_second_derivatives_exist() -> None:
    values = [v.double().detach().requires_grad_() for v in make(3)]
    assert torch.autograd.gradgradcheck(lambda *v: tuple(regroup(v, GROUPS)), values)


@pytest.mark.skipif(not is_compiled, reason="the reference trusts its input")
def test_block_outside_its_tensor_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a block is not within tensor 0"):
        regroup([torch.ones(2, 3)], [[(0, 2, 2), (0, 0, 1)]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regroup_passes_opcheck(dtype: torch.dtype) -> None:
    values = make(3, dtype)
    torch.library.opcheck(torch.ops.shardwise.regroup.default, (values, BLOCKS, SIZES))
    grads = [group.detach().requires_grad_() for group in reference.regroup(values, BLOCKS, SIZES)]
    arguments = (grads, BLOCKS, SIZES, [7, 5])
    torch.library.opcheck(torch.ops.shardwise.regroup_grad.default, arguments)
