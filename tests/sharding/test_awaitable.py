"""Results on their way act as the value, and are waited for once, at the first use."""

import pytest
import torch

from shardwise.jagged import KeyedTensor
from shardwise.sharding.awaitable import Awaitable, LazyAwaitable, NoWait


def lazy(value, waits=None):
    def wait():
        if waits is not None:
            waits.append(value)
        return value

    return LazyAwaitable(wait, type(value))


def test_nothing_is_waited_for_before_the_first_use():
    waits = []
    result = lazy(KeyedTensor(["a"], [2], torch.ones(3, 2)), waits)
    assert isinstance(result, Awaitable)
    assert isinstance(result, KeyedTensor)
    assert waits == []
    assert result.keys() == ["a"]
    assert result["a"].shape == (3, 2)
    assert len(waits) == 1


def test_functions_and_operators_take_it_as_a_tensor():
    value = torch.tensor([1.0, -2.0])
    result = lazy(value)
    assert torch.equal(torch.cat([result, value]), torch.cat([value, value]))
    assert torch.equal(torch.relu(result), torch.relu(value))
    assert torch.equal(2 * result + value, 3 * value)
    assert torch.equal(value - result, torch.zeros(2))
    assert torch.equal(result - lazy(value), torch.zeros(2))
    assert [float(x) for x in result] == [1.0, -2.0]
    assert len(result) == 2


def test_gradients_flow_through_it():
    value = torch.ones(2, requires_grad=True)
    torch.mul(lazy(value), 3).sum().backward()
    assert torch.equal(value.grad, torch.full((2,), 3.0))


def test_wait_gives_the_value_itself():
    value = {"a": torch.ones(1)}
    assert lazy(value).wait() is value
    assert NoWait(value).wait() is value


def test_error_of_the_wait_is_raised_at_the_use():
    def fail():
        raise IndexError("id 7")

    with pytest.raises(IndexError, match="id 7"):
        LazyAwaitable(fail, dict)["a"]
