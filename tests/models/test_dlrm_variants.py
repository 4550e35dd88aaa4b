"""DLRM with a cross net or projections: values, names, devices, training, tracing, errors."""

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.data import Batch
from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import (
    DLRM,
    DLRM_DCN,
    DLRM_Projection,
    DLRMTrain,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from shardwise.nn import LowRankCrossNet
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

KEYS = ["user", "movie", "genres"]


def tables(device: str = "cpu") -> EmbeddingBagCollection:
    configs = [EmbeddingBagConfig(10, 4, key, feature_names=[key]) for key in KEYS]
    return EmbeddingBagCollection(configs, device=device)


def bags(num_samples: int) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(KEYS) * num_samples,))
    return KeyedJaggedTensor(KEYS, torch.randint(10, (int(lengths.sum()),)), lengths=lengths)


def small_dcn(dense_device: str | None = None) -> DLRM_DCN:
    return DLRM_DCN(tables(), 5, [6, 4], [8, 1], 2, 3, dense_device=dense_device)


def small_projection(dense_device: str | None = None) -> DLRM_Projection:
    return DLRM_Projection(tables(), 5, [6, 4], [8, 1], [7, 12], [8], dense_device=dense_device)


every_model = pytest.mark.parametrize("make", [small_dcn, small_projection], ids=["dcn", "proj"])


# ---- values


@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_cross_net_takes_all_vectors_side_by_side(num_samples):
    net = LowRankCrossNet(16, 1, 3, dtype=torch.float64)
    dense, sparse = np.random.randn(num_samples, 4), np.random.randn(num_samples, 3, 4)
    w, v, b = (nn.init.normal_(p).detach().numpy() for p in net.parameters())
    x = np.concatenate([dense, sparse.reshape(num_samples, 12)], 1)
    actual = InteractionDCNArch(3, net)(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(actual.detach().numpy(), x * (x @ v.T @ w.T + b) + x, atol=1e-12)


@pytest.mark.parametrize("num_samples", [0, 1, 63])
def test_projections_meet_in_dot_products(num_samples):
    first, second = nn.Linear(16, 12).double(), nn.Linear(16, 8).double()
    dense, sparse = np.random.randn(num_samples, 4), np.random.randn(num_samples, 3, 4)
    x = np.concatenate([dense, sparse.reshape(num_samples, 12)], 1)
    one, other = (
        x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        for layer in (first, second)
    )
    products = one.reshape(num_samples, 3, 4) @ other.reshape(num_samples, 4, 2)
    expected = np.concatenate([dense, products.reshape(num_samples, 6)], 1)
    arch = InteractionProjectionArch(3, first, second)
    actual = arch(torch.from_numpy(dense), torch.from_numpy(sparse)).detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@every_model
def test_model_is_its_parts_in_turn(make):
    model, dense, features = make(), torch.randn(6, 5), bags(6)
    vectors = model.dense_arch(dense), model.sparse_arch(features)
    actual = model(dense, features)
    assert torch.equal(actual, model.over_arch(model.inter_arch(*vectors)))
    assert actual.shape == (6, 1)
    assert isinstance(model, DLRM)


# ---- parameters


def test_dcn_parameters_have_the_names_of_the_field():
    shapes = {n: list(p.shape) for n, p in small_dcn().state_dict().items() if "inter" in n}
    assert shapes == {
        **{f"inter_arch.crossnet.W_kernels.{layer}": [16, 3] for layer in range(2)},
        **{f"inter_arch.crossnet.V_kernels.{layer}": [3, 16] for layer in range(2)},
        **{f"inter_arch.crossnet.bias.{layer}": [16] for layer in range(2)},
    }


def test_projection_parameters_have_the_names_of_the_field():
    shapes = {n: list(p.shape) for n, p in small_projection().state_dict().items() if "arch.i" in n}
    assert {name: shape for name, shape in shapes.items() if "weight" in name} == {
        "inter_arch.interaction_branch1.model._mlp.0._linear.weight": [7, 16],
        "inter_arch.interaction_branch1.model._mlp.1._linear.weight": [12, 7],
        "inter_arch.interaction_branch2.model._mlp.0._linear.weight": [8, 16],
    }


@every_model
def test_dense_device_is_that_of_all_but_the_tables(make):
    devices = {n.split(".")[0]: p.device.type for n, p in make("meta").named_parameters()}
    wanted = {"dense_arch": "meta", "inter_arch": "meta", "over_arch": "meta"}
    assert devices == {"sparse_arch": "cpu", **wanted}


def test_only_what_is_kept_draws_random_numbers():
    torch.manual_seed(1)
    model = small_dcn()
    after = torch.rand(1)
    torch.manual_seed(1)
    tables()
    for linear in [m for m in model.dense_arch.modules() if isinstance(m, nn.Linear)]:
        linear.reset_parameters()
    LowRankCrossNet(16, 2, 3)
    for linear in [m for m in model.over_arch.modules() if isinstance(m, nn.Linear)]:
        linear.reset_parameters()
    assert torch.equal(torch.rand(1), after)


# ---- training and tracing


@every_model
def test_every_part_learns(make):
    model = make()
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1)
    dense = torch.optim.Adam([p for n, p in model.named_parameters() if "sparse" not in n], 0.02)
    batch = Batch(torch.randn(64, 5), bags(64), torch.randint(2, (64,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(30):
        dense.zero_grad()
        loss, _ = DLRMTrain(model)(batch)
        loss.backward()
        dense.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@every_model
def test_compiled_training_equals_eager(make):
    model, dense, features = make(), torch.randn(6, 5), bags(6)
    model(dense, features).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(dense, features).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


# ---- refused


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "arch",
    [
        InteractionDCNArch(3, nn.Identity()),
        InteractionProjectionArch(3, nn.Identity(), nn.Identity()),
    ],
)
def test_interactions_name_the_vectors_they_want(arch):
    message = f"{type(arch).__name__}: got 2 sparse vectors of width 4, wants 3 of .* one's, 4"
    with pytest.raises(ValueError, match=message):
        arch(torch.randn(5, 4), torch.randn(5, 2, 4))


def test_branch_that_gives_no_whole_vectors_is_named():
    arch = InteractionProjectionArch(3, nn.Linear(16, 12), nn.Linear(16, 9))
    with pytest.raises(ValueError, match=r"branch 2 gives 9 columns, .* multiple of .* width, 4"):
        arch(torch.randn(5, 4), torch.randn(5, 3, 4))


@pytest.mark.parametrize("sizes", [[7, 11], []])
def test_projections_end_in_multiples_of_the_width(sizes):
    message = r"interaction_branch2_layer_sizes \[.*\] must end in a multiple of .*embedding_dim, 4"
    with pytest.raises(ValueError, match=message):
        DLRM_Projection(tables(), 5, [4], [8, 1], [8], sizes)


def test_messages_name_the_model():
    with pytest.raises(ValueError, match="DLRM_DCN: dense_arch_layer_sizes"):
        DLRM_DCN(tables(), 5, [6], [8, 1], 2, 3)
    with pytest.raises(ValueError, match="low_rank must be at least 1, got 0"):
        DLRM_DCN(tables(), 5, [4], [8, 1], 2, 0)
