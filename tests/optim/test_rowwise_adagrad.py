"""Row-wise Adagrad: its formula, dense and row-sparse gradients alike, its options."""

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.optim import RowWiseAdagrad

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"lr_decay": 0.5, "initial_accumulator_value": 2.0},
    {"maximize": True, "weight_decay": 0.3, "eps": 1e-2},
]


def train(weight, gradients, **options):
    """Take a step for each gradient."""
    param = nn.Parameter(weight.clone())
    optimizer = RowWiseAdagrad([param], **options)
    for gradient in gradients:
        param.grad = gradient
        optimizer.step()
    return param.detach(), optimizer.state[param]


def row_sparse(rows, num_rows, values):
    indices, shape = torch.tensor([rows], dtype=torch.int64), (num_rows, *values.shape[1:])
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def by_numpy(weight, gradients, lr=0.01, lr_decay=0.0, weight_decay=0.0, **options):
    total = np.full(len(weight), options.get("initial_accumulator_value", 0.0))
    for step, gradient in enumerate(gradients):
        gradient = -gradient if options.get("maximize") else gradient
        gradient = gradient + weight_decay * weight
        total = total + (gradient**2).mean(1)
        scale = np.sqrt(total)[:, None] + options.get("eps", 1e-10)
        weight = weight - lr / (1 + step * lr_decay) * gradient / scale
    return weight, total


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_formula(options):
    weight = torch.randn(5, 3, dtype=torch.float64)
    gradients = [torch.randn_like(weight) for _ in range(4)]
    ours, state = train(weight, gradients, lr=0.2, **options)
    theirs, total = by_numpy(weight.numpy(), [g.numpy() for g in gradients], lr=0.2, **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(state["sum"][:, 0], total, rtol=1e-12)


def test_sum_is_the_mean_square_of_the_row():
    _, state = train(torch.zeros(2, 4), [torch.tensor([[2.0, 4, 6, 8], [0, 0, 0, 0]])])
    assert state["sum"].tolist() == [[30.0], [0.0]]
    assert state["step"] == 1


def test_equals_adagrad_where_rows_have_one_column():
    weight, gradient = torch.randn(6, 1), torch.randn(6, 1)
    param = nn.Parameter(weight.clone())
    adagrad = torch.optim.Adagrad([param], lr=0.3, weight_decay=0.1, lr_decay=0.2)
    for _ in range(3):
        param.grad = gradient.clone()
        adagrad.step()
    ours, _ = train(weight, [gradient] * 3, lr=0.3, weight_decay=0.1, lr_decay=0.2)
    torch.testing.assert_close(ours, param.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(7, 3), (7,), (7, 2, 3)])
@pytest.mark.parametrize("rows", [[4, 1, 4], []])
def test_row_sparse_gradient_equals_dense(options, shape, rows):
    gradient = row_sparse(rows, 7, torch.randn(len(rows), *shape[1:]))
    weight = torch.randn(shape)
    sparse, sparse_state = train(weight, [gradient] * 2, **options)
    dense, dense_state = train(weight, [gradient.to_dense()] * 2, **options)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(sparse_state, dense_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_have_sums_in_float32(dtype):
    gradient = torch.full((2, 4), 300.0, dtype=dtype)  # its square is past the largest float16
    weight, state = train(torch.zeros(2, 4, dtype=dtype), [gradient], lr=0.5)
    assert state["sum"].dtype == torch.float32
    torch.testing.assert_close(weight, torch.full_like(weight, -0.5))


def test_vector_and_scalar_parameters_have_one_row_per_element():
    weight, state = train(torch.zeros(3), [torch.tensor([1.0, -2.0, 4.0])], lr=1.0)
    assert weight.tolist() == [-1.0, 1.0, -1.0]
    assert state["sum"].tolist() == [[1.0], [4.0], [16.0]]
    weight, _ = train(torch.tensor(1.0), [torch.tensor(5.0)], lr=0.25)
    assert weight.item() == 0.75


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_parameter_without_elements_is_left_alone(shape):
    weight, state = train(torch.zeros(shape), [torch.zeros(shape)], weight_decay=0.1)
    assert weight.shape == shape
    assert not state["sum"].any()


def test_learning_rate_may_be_a_tensor():
    gradient = torch.randn(3, 2)
    by_tensor, _ = train(torch.zeros(3, 2), [gradient], lr=torch.tensor(0.5))
    by_number, _ = train(torch.zeros(3, 2), [gradient], lr=0.5)
    torch.testing.assert_close(by_tensor, by_number)


def test_step_gives_the_loss_of_the_closure():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = RowWiseAdagrad([param], lr=0.5)

    def closure():
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert param.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_added_group_has_its_own_options():
    first, second = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))
    optimizer = RowWiseAdagrad([first], lr=0.1)
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    first.grad = second.grad = torch.ones(1, 1)
    optimizer.step()
    torch.testing.assert_close(torch.cat([first, second]), torch.tensor([[0.9], [0.5]]))


def test_state_survives_a_round_trip():
    param = nn.Parameter(torch.randn(3, 2))
    param.grad = torch.randn(3, 2)
    optimizer = RowWiseAdagrad([param])
    optimizer.step()
    other = RowWiseAdagrad([param])
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.state[param], optimizer.state[param])


def test_gradient_that_is_sparse_in_columns_is_refused():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.eye(2).to_sparse()
    optimizer = RowWiseAdagrad([param])
    with pytest.raises(ValueError, match=r"parameter \(2, 2\) .* sparse in 2 dimensions"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 0
    assert param.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "name", ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"]
)
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1.0"):
        RowWiseAdagrad([nn.Parameter(torch.ones(1, 1))], **{name: -1.0})
