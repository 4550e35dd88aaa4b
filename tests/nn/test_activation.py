"""Activations and initialisations: values, options, refused input."""

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.nn import MLP, Perceptron, SwishLayerNorm


@pytest.mark.parametrize("dims", [3, [3], [2, 3]])
def test_swish_layer_norm_equals_numpy(dims):
    module = SwishLayerNorm(dims, dtype=torch.float64)
    scale, shift = (nn.init.normal_(parameter) for parameter in module.parameters())
    x = np.random.randn(5, 2, 3)
    axes = (1, 2) if dims == [2, 3] else 2
    centred = x - x.mean(axes, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
    gate = 1 / (1 + np.exp(-(normal * scale.detach().numpy() + shift.detach().numpy())))
    actual = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(actual, x * gate, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swish_layer_norm_options_reach_its_parameters(device, dtype):
    module = SwishLayerNorm([4], device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
    assert list(module.state_dict()) == ["norm.0.weight", "norm.0.bias"]
    assert module(torch.ones(5, 4, device=device, dtype=dtype)).dtype == dtype


def test_swish_layer_norm_names_the_dimensions_it_wants():
    with pytest.raises(ValueError, match=r"shape \[5, 4\], which must end in input_dims, \[3\]"):
        SwishLayerNorm(3)(torch.randn(5, 4))
    with pytest.raises(ValueError, match="input_dims must be positive, got 0"):
        SwishLayerNorm(0)


def test_each_layer_has_its_own_swish_layer_norm():
    mlp = MLP(3, [4, 2], activation="swish_layernorm", dtype=torch.float64)
    shapes = {name: list(p.shape) for name, p in mlp.named_parameters() if "norm" in name}
    assert shapes == {
        "_mlp.0._activation_fn.norm.0.weight": [4],
        "_mlp.0._activation_fn.norm.0.bias": [4],
        "_mlp.1._activation_fn.norm.0.weight": [2],
        "_mlp.1._activation_fn.norm.0.bias": [2],
    }
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = x
    for layer in mlp._mlp:
        linear = layer._linear(expected)
        expected = linear * torch.sigmoid(nn.functional.layer_norm(linear, linear.shape[1:]))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("kaiming_normal", (2 / 400) ** 0.5),
        ("kaiming_uniform", (2 / 400) ** 0.5),
        ("orthogonal", (1 / 400) ** 0.5),
        ("xavier_normal", (2 / 700) ** 0.5),
        ("xavier_uniform", (2 / 700) ** 0.5),
    ],
)
def test_initialisation_by_name(name, deviation):
    perceptron = Perceptron(400, 300, init=name)
    assert perceptron._linear.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert perceptron._linear.weight.mean().item() == pytest.approx(0, abs=0.01 * deviation)
    assert not perceptron._linear.bias.any()


def test_initialisation_may_be_a_function_for_all_layers():
    mlp = MLP(3, [4, 2], init=nn.init.ones_)
    weights = [parameter for name, parameter in mlp.named_parameters() if "weight" in name]
    assert all((weight == 1).all() for weight in weights)
    assert len(weights) == 2


def test_unknown_initialisation_lists_the_known():
    with pytest.raises(ValueError, match=r"init 'glorot' is unknown; known are .*xavier_normal"):
        MLP(3, [2], init="glorot")


@pytest.mark.usefixtures("no_shape_checks")
def test_swish_layer_norm_compiles_to_one_graph():
    module, x = SwishLayerNorm(3), torch.randn(6, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
