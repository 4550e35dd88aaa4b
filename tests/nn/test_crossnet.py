"""Cross nets: values in float64, parameter names, options, refused input."""

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.nn import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet, VectorCrossNet

NETS = {
    "full": CrossNet,
    "vector": VectorCrossNet,
    "low rank": lambda n, layers, **options: LowRankCrossNet(n, layers, 2, **options),
    "mixture": lambda n, layers, **options: LowRankMixtureCrossNet(n, layers, 3, 2, **options),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def arrays(parameters: nn.ParameterList) -> list[np.ndarray]:
    """Values of parameters after filling them, biases too, with random numbers."""
    return [nn.init.normal_(parameter, std=0.5).detach().numpy() for parameter in parameters]


def check(net: nn.Module, x: np.ndarray, expected: np.ndarray) -> None:
    actual = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_full_net_equals_numpy(num_layers, num_samples):
    net = CrossNet(5, num_layers, dtype=torch.float64)
    x0 = x = np.random.randn(num_samples, 5)
    for w, b in zip(arrays(net.kernels), arrays(net.bias), strict=True):
        x = x0 * (x @ w.T + b[:, 0]) + x
    check(net, x0, x)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_vector_net_equals_numpy(num_layers):
    net = VectorCrossNet(5, num_layers, dtype=torch.float64)
    x0 = x = np.random.randn(7, 5)
    for w, b in zip(arrays(net.kernels), arrays(net.bias), strict=True):
        x = x0 * (x @ w) + b[:, 0] + x
    check(net, x0, x)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("low_rank", [1, 2, 6])
def test_low_rank_net_equals_numpy(num_layers, low_rank):
    net = LowRankCrossNet(5, num_layers, low_rank, dtype=torch.float64)
    x0 = x = np.random.randn(7, 5)
    kernels = arrays(net.W_kernels), arrays(net.V_kernels), arrays(net.bias)
    for w, v, b in zip(*kernels, strict=True):
        x = x0 * (x @ v.T @ w.T + b) + x
    check(net, x0, x)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
@pytest.mark.parametrize(("activation", "act"), [("relu", lambda x: x.clip(0)), ("tanh", np.tanh)])
def test_mixture_equals_numpy(num_layers, num_experts, activation, act):
    net = LowRankMixtureCrossNet(5, num_layers, num_experts, 2, activation, dtype=torch.float64)
    x0 = x = np.random.randn(7, 5)
    kernels = [arrays(ps) for ps in (net.U_kernels, net.V_kernels, net.C_kernels, net.bias)]
    gates = arrays(net.gates.parameters())
    for us, vs, cs, b in zip(*kernels, strict=True):
        experts = [
            x0 * (act(act(x @ v.T) @ c.T) @ u.T + b[:, 0])
            for u, v, c in zip(us, vs, cs, strict=True)
        ]
        gate = np.exp([x @ gate[0] for gate in gates]) if gates else np.ones((1, 7))
        x = np.einsum("kb,kbn->bn", gate / gate.sum(0), experts) + x
    check(net, x0, x)


def test_parameters_have_the_names_and_shapes_of_the_field():
    def shapes(net):
        return {name: list(value.shape) for name, value in net.state_dict().items()}

    assert shapes(CrossNet(5, 1)) == {"kernels.0": [5, 5], "bias.0": [5, 1]}
    assert shapes(VectorCrossNet(5, 1)) == {"kernels.0": [5, 1], "bias.0": [5, 1]}
    low_rank = {"W_kernels.0": [5, 2], "V_kernels.0": [2, 5], "bias.0": [5]}
    assert shapes(LowRankCrossNet(5, 1, 2)) == low_rank
    assert shapes(LowRankMixtureCrossNet(5, 1, 3, 2)) == {
        "U_kernels.0": [3, 5, 2],
        "V_kernels.0": [3, 2, 5],
        "C_kernels.0": [3, 2, 2],
        "bias.0": [5, 1],
        **{f"gates.{k}.weight": [1, 5] for k in range(3)},
    }


@every_net
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_device_and_dtype_reach_every_parameter(make, device, dtype):
    net = make(5, 2, device=device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {(device, dtype)}
    crossed = net(torch.ones(2, 3, 5, device=device, dtype=dtype))
    assert (crossed.shape, crossed.device.type, crossed.dtype) == ((2, 3, 5), device, dtype)


@every_net
def test_layers_start_apart_and_biases_at_zero(make):
    net = make(5, 2)
    for name, parameter in net.named_parameters():
        assert bool(parameter.any()) != name.startswith("bias")
    first = net.W_kernels if isinstance(net, LowRankCrossNet) else next(net.children())
    assert not torch.equal(first[0], first[1])


def test_every_expert_starts_as_a_matrix_of_its_own():
    net = LowRankMixtureCrossNet(400, 1, 8, 300, init="xavier_normal")
    for kernel in (net.U_kernels[0], net.V_kernels[0]):
        deviations = kernel.detach().std(dim=(1, 2))
        torch.testing.assert_close(
            deviations, torch.full((8,), (2 / 700) ** 0.5), rtol=0.03, atol=0
        )


@every_net
def test_initialisation_may_be_a_function(make):
    net = make(5, 2, init=lambda weight: weight.fill_(0.5))
    kernels = [p for name, p in net.named_parameters() if "kernels" in name]
    assert all((kernel == 0.5).all() for kernel in kernels)


@every_net
def test_a_few_steps_fit_a_product(make):
    net, x = make(5, 2), torch.randn(64, 5)
    target = x * x[:, :1]
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.usefixtures("no_shape_checks")
@every_net
def test_compiles_to_one_graph(make):
    net, x = make(5, 2), torch.randn(6, 5, requires_grad=True)
    expected = net(x)
    torch._dynamo.reset()
    actual = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


# ---- refused


@every_net
def test_wrong_width_names_given_and_wanted(make):
    with pytest.raises(ValueError, match="the input has 4 columns, the net was made for 5"):
        make(5, 2)(torch.randn(6, 4))


@every_net
def test_numbers_must_be_positive(make):
    with pytest.raises(ValueError, match="CrossNet: in_features must be at least 1, got 0"):
        make(0, 2)
    with pytest.raises(ValueError, match="CrossNet: num_layers must be at least 1, got 0"):
        make(5, 0)


def test_rank_and_experts_must_be_positive():
    with pytest.raises(ValueError, match="LowRankCrossNet: low_rank must be at least 1, got 0"):
        LowRankCrossNet(5, 2, 0)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        LowRankMixtureCrossNet(5, 2, 0)


@every_net
def test_unknown_initialisation_is_refused(make):
    with pytest.raises(ValueError, match=r"init 'glorot' is unknown; known are .*xavier_normal"):
        make(5, 2, init="glorot")


def test_unknown_activation_of_experts_is_refused():
    with pytest.raises(ValueError, match=r"activation 'swish' is unknown; known are .*relu"):
        LowRankMixtureCrossNet(5, 2, activation="swish")
