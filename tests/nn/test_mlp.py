"""Dense stacks: values, shapes, options, refused input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.nn import MLP, Perceptron


def arrays(module: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in module.parameters()]


@pytest.mark.parametrize("activation_on_last", [True, False])
def test_mlp_equals_numpy(activation_on_last):
    mlp = MLP(5, [4, 3], dtype=torch.float64, activation_on_last=activation_on_last)
    x = np.random.randn(7, 5)
    first, first_bias, last, last_bias = arrays(mlp)
    hidden = np.maximum(x @ first.T + first_bias, 0) @ last.T + last_bias
    expected = np.maximum(hidden, 0) if activation_on_last else hidden
    np.testing.assert_allclose(mlp(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-12)
    assert (hidden < 0).any()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("softplus", lambda x: np.log1p(np.exp(x))),
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x)),
        ("gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2),
        ("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
    ],
)
def test_activation_by_name(name, function):
    perceptron = Perceptron(3, 2, activation=name, dtype=torch.float64)
    x = np.random.randn(9, 3)
    weight, bias = arrays(perceptron)
    actual = perceptron(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(actual, function(x @ weight.T + bias), atol=1e-12)


def test_activation_may_be_a_module_that_all_layers_share():
    mlp = MLP(3, [4, 2], activation=nn.PReLU(init=0.5))
    x = torch.randn(8, 3)
    hidden = nn.functional.leaky_relu(mlp._mlp[0]._linear(x), 0.5)
    expected = nn.functional.leaky_relu(mlp._mlp[1]._linear(hidden), 0.5)
    torch.testing.assert_close(mlp(x), expected)
    assert sum(parameter.numel() for parameter in mlp.parameters()) == 16 + 10 + 1


def test_unknown_activation_lists_the_known():
    with pytest.raises(
        ValueError, match=r"activation 'swish' is unknown; known are .*relu, .*tanh"
    ):
        MLP(3, [2], activation="swish")


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("activation", [nn.ReLU, 3])
def test_activation_that_is_no_function_is_refused(activation):
    with pytest.raises(TypeError, match="a name, a function on a tensor, or a module"):
        Perceptron(3, 2, activation=activation)


def test_bias_dtype_and_device_reach_every_layer():
    mlp = MLP(3, [4, 2], bias=False, device="meta", dtype=torch.bfloat16)
    assert [name for name, _ in mlp.named_parameters()] == [
        "_mlp.0._linear.weight",
        "_mlp.1._linear.weight",
    ]
    assert {(p.device.type, p.dtype) for p in mlp.parameters()} == {("meta", torch.bfloat16)}
    assert mlp(torch.empty(5, 3, device="meta", dtype=torch.bfloat16)).shape == (5, 2)


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (2, 5, 3), (3,)])
def test_layers_apply_to_the_last_dimension(shape):
    assert MLP(3, [4, 2])(torch.randn(shape)).shape == (*shape[:-1], 2)


def test_wrong_width_names_given_and_wanted():
    with pytest.raises(ValueError, match="the input has 4 columns, the layer was made for 3"):
        MLP(3, [2])(torch.randn(5, 4))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="layer_sizes is empty"):
        MLP(3, [])
    with pytest.raises(ValueError, match="sizes must be positive, got in_size 4 and out_size 0"):
        MLP(3, [4, 0])


@pytest.mark.usefixtures("no_shape_checks")
def test_mlp_compiles_to_one_graph():
    mlp = MLP(3, [4, 2], activation="gelu")
    x = torch.randn(6, 3)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
