"""DeepFM and factorization machine: values in float64, gradients, refused input."""

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.nn import DeepFM, FactorizationMachine


def embeddings(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_deep_part_takes_the_flattened_embeddings_in_order():
    given = embeddings((5, 3), (5, 2, 4))
    linear = nn.Linear(11, 2, dtype=torch.float64)
    actual = DeepFM(linear)(given).detach().numpy()
    joined = np.concatenate([given[0].numpy(), given[1].numpy().reshape(5, 8)], 1)
    weight, bias = (p.detach().numpy() for p in linear.parameters())
    np.testing.assert_allclose(actual, joined @ weight.T + bias, atol=1e-12)


@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_factorization_machine_pairs_all_scalars(num_samples):
    given = embeddings((num_samples, 3), (num_samples, 2, 4))
    x = torch.cat([e.flatten(1) for e in given], 1).numpy()
    upper = np.triu_indices(11, 1)
    expected = (x[:, upper[0]] * x[:, upper[1]]).sum(1, keepdims=True)
    actual = FactorizationMachine()(given)
    assert actual.shape == (num_samples, 1)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_factorization_machine_per_dimension_adds_dot_products(num_samples):
    given = embeddings((num_samples, 4), (num_samples, 2, 4), (num_samples, 4))
    x = torch.cat([e.flatten(1) for e in given], 1).numpy().reshape(num_samples, 4, 4)
    pairs = [x[:, i] * x[:, j] for i in range(4) for j in range(i + 1, 4)]
    actual = FactorizationMachine(per_dimension=True)(given).numpy()
    np.testing.assert_allclose(actual, np.sum(pairs, (0, 2))[:, None], atol=1e-10)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_factorization_machine_gradients(per_dimension):
    given = [e.requires_grad_() for e in embeddings((3, 4), (3, 2, 4))]
    machine = FactorizationMachine(per_dimension=per_dimension)
    assert torch.autograd.gradcheck(lambda *e: machine(list(e)), given)


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factorization_machine_keeps_dtype_and_device(per_dimension, device, dtype):
    given = [torch.ones(5, 4, device=device, dtype=dtype)] * 3
    result = FactorizationMachine(per_dimension=per_dimension)(given)
    assert (result.shape, result.device.type, result.dtype) == ((5, 1), device, dtype)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "module",
    [DeepFM(nn.Linear(12, 2)), FactorizationMachine(), FactorizationMachine(per_dimension=True)],
    ids=["deep", "all scalars", "per dimension"],
)
def test_compiles_to_one_graph(module):
    given = [torch.randn(5, 4), torch.randn(5, 2, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), module(given))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("module", [DeepFM(nn.Identity()), FactorizationMachine()])
def test_samples_must_agree(module):
    message = "embedding 1 has 6 samples, embedding 0 5; all must have the same number"
    with pytest.raises(ValueError, match=message):
        module([torch.randn(5, 4), torch.randn(6, 4)])
    with pytest.raises(ValueError, match=f"{type(module).__name__}: got no embeddings"):
        module([])


def test_widths_must_agree_per_dimension():
    message = r"embedding 1 has shape \[5, 3\], embedding 0 \[5, 4\]; .* end in the same width"
    with pytest.raises(ValueError, match=message):
        FactorizationMachine(per_dimension=True)([torch.randn(5, 4), torch.randn(5, 3)])
