"""The interaction equals its reference, forward and backward, at every shape and on any device."""

import pytest
import torch
from torch import Tensor

from shardwise.ops.interaction import interaction, reference
from shardwise.ops.library import is_compiled


def make(batch: int, num_sparse: int, width: int) -> tuple[Tensor, Tensor]:
    shapes = (batch, width), (batch, num_sparse, width)
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("width", [1, 16, 23, 64, 100])
@pytest.mark.parametrize(("batch", "num_sparse"), [(0, 3), (1, 0), (1, 1), (63, 15), (9, 26)])
def test_products_and_gradients_equal_the_reference(batch, num_sparse, width):
    inputs = make(batch, num_sparse, width)
    fast, plain = interaction(*inputs), reference.interaction(*inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, grad)
    by_reference = reference.interaction_grad(grad, *inputs)
    given = torch.autograd.grad(fast, inputs, grad)
    for ours, formula, autograd in zip(given, by_reference, wanted, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(formula, autograd, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_sparse", [40, 127])
def test_many_vectors_equal_the_reference(num_sparse):
    inputs = make(3, num_sparse, 32)
    fast, plain = interaction(*inputs), reference.interaction(*inputs)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, grad)
    for ours, autograd in zip(torch.autograd.grad(fast, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-5, atol=1e-4)


def test_any_number_of_threads_gives_the_same_bits():
    dense, sparse = make(501, 26, 64)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        result = interaction(dense, sparse)
        results.append((result, *torch.autograd.grad(result.sin().sum(), (dense, sparse))))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.bfloat16, torch.float32)])
def test_other_dtypes_are_promoted(dtypes):
    dense, sparse = make(5, 3, 8)
    result = interaction(dense.to(dtypes[0]), sparse.to(dtypes[1]))
    assert result.dtype == torch.promote_types(*dtypes)
    torch.testing.assert_close(result.float(), interaction(dense, sparse), rtol=0.05, atol=0.05)


def test_second_derivatives_exist():
    dense, sparse = make(2, 3, 4)
    (first,) = torch.autograd.grad(interaction(dense, sparse).sum(), dense, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), sparse)
    (plain,) = torch.autograd.grad(
        reference.interaction(dense, sparse).sum(), dense, create_graph=True
    )
    torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), sparse)[0])


def test_columns_of_larger_tensors_are_taken():
    dense, sparse = torch.randn(6, 16)[:, 3:11], torch.randn(3, 6, 8).transpose(0, 1)
    wanted = reference.interaction(dense, sparse)
    torch.testing.assert_close(interaction(dense, sparse), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not is_compiled, reason="the reference trusts its input")
def test_vectors_of_another_width_are_refused():
    with pytest.raises(RuntimeError, match=r"needs dense \[B, D\] and sparse \[B, F, D\]"):
        torch.ops.shardwise.interaction(torch.ones(2, 3), torch.ones(2, 4, 5))


def test_interaction_passes_opcheck():
    dense, sparse = make(3, 4, 8)
    torch.library.opcheck(torch.ops.shardwise.interaction.default, (dense, sparse))
    grad = torch.randn(3, 18)
    arguments = (grad, dense.detach(), sparse.detach())
    torch.library.opcheck(torch.ops.shardwise.interaction_grad.default, arguments)
