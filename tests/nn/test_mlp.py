"""Perceptrons and stacks of them."""

import pytest
import torch

from shardwise.nn import MLP, Perceptron


def layers(module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parameters = [p.detach().double() for p in module.parameters()]
    return list(zip(parameters[::2], parameters[1::2], strict=True))


@pytest.mark.parametrize("activation_on_last", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (0, 3)])
def test_mlp_equals_matrix_products(activation_on_last, shape):
    mlp = MLP(3, [4, 2], activation_on_last=activation_on_last)
    x = torch.randn(shape)
    (w1, b1), (w2, b2) = layers(mlp)
    wanted = (x.double() @ w1.T + b1).clamp(min=0) @ w2.T + b2
    if activation_on_last:
        wanted = wanted.clamp(min=0)
    torch.testing.assert_close(mlp(x).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "gelu", "silu"])
def test_activation_by_name_equals_the_function(name):
    layer = Perceptron(3, 2, activation=name)
    x = torch.randn(4, 3)
    function = getattr(torch.nn.functional, name)
    torch.testing.assert_close(layer(x), function(layer._linear(x)))


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown activation 'relo'; known are .*'relu'"):
        MLP(3, [2], activation="relo")


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"width 3, got shape \(4, 5\)"):
        MLP(3, [2])(torch.randn(4, 5))


def test_an_mlp_needs_layers():
    with pytest.raises(ValueError, match="positive width"):
        MLP(3, [])


def test_bias_dtype_and_device_are_kept():
    mlp = MLP(3, [2, 2], bias=False, dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in mlp.parameters())
    assert len(list(mlp.parameters())) == 2
