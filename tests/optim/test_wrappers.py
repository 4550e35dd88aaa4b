"""Joined and wrapped optimizers: one step, one state dict, one list of groups."""

import copy

import pytest
import torch
from torch import nn

from shardwise.optim import (
    CombinedOptimizer,
    FusedOptimizer,
    FusedOptimizerModule,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    OptimizerWrapper,
    WarmupOptimizer,
    WarmupStage,
)


def adam(**params):
    return KeyedOptimizerWrapper(params, lambda tensors: torch.optim.Adam(tensors, lr=0.1))


def sgd(**params):
    return KeyedOptimizerWrapper(params, lambda tensors: torch.optim.SGD(tensors, lr=0.2))


def parameter(*shape):
    param = nn.Parameter(torch.ones(shape))
    param.grad = torch.full(shape, 2.0)
    return param


class PushesRate(FusedOptimizer):
    """A fused optimizer that notes the learning rates it hands on."""

    def __init__(self, **params):
        group = {"params": [*params.values()], "lr": 0.5}
        state = {param: {"momentum1": torch.zeros(3)} for param in params.values()}
        super().__init__(params, state, [group])
        self.pushed = []
        self.num_loads = 0

    def step(self, closure=None):
        self.pushed.append(self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none=True):
        self.pushed.append(self.param_groups[0]["lr"])

    def post_load_state_dict(self):
        self.num_loads += 1


def test_combined_step_and_zero_grad_reach_every_part():
    first, second = parameter(2), parameter(3)
    optimizer = CombinedOptimizer([sgd(a=first), ("dense", sgd(b=second))])
    optimizer.step()
    assert torch.cat([first, second]).tolist() == pytest.approx([0.6] * 5)
    optimizer.zero_grad()
    assert first.grad is None
    assert second.grad is None


def test_combined_names_have_the_prefix_of_their_part():
    optimizer = CombinedOptimizer([adam(a=parameter(2)), ("dense", adam(a=parameter(3)))])
    optimizer.step()
    assert [*optimizer.params] == ["a", "dense.a"]
    assert optimizer.state_dict()["state"].keys() == {"a", "dense.a"}


def test_combined_shows_its_parts():
    first, second = adam(a=parameter(2)), adam(b=parameter(2))
    optimizer = CombinedOptimizer([first, ("dense", second)])
    assert optimizer.optimizers == [("", first), ("dense", second)]
    assert optimizer._optims == optimizer.optimizers


def test_combined_state_is_that_of_the_parts_and_adds_nothing_to_it():
    first, second = parameter(2), parameter(3)
    optimizer = CombinedOptimizer([adam(a=first), sgd(b=second)])
    optimizer.step()
    assert len(optimizer.state) == 1
    assert optimizer.state[first]["exp_avg"].shape == (2,)
    assert second not in optimizer.state
    with pytest.raises(KeyError):
        optimizer.state[second]
    assert optimizer.state_dict()["state"].keys() == {"a"}


def test_scheduler_of_the_combined_optimizer_drives_every_part():
    optimizer = CombinedOptimizer([sgd(a=parameter(2)), PushesRate(b=parameter(2))])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    (_, first), (_, second) = optimizer.optimizers
    assert first.param_groups[0]["lr"] == 0.1
    assert second.pushed == [0.5, 0.25]


def test_combined_state_dict_round_trip():
    table = parameter(3)
    source = CombinedOptimizer([adam(a=parameter(2)), ("x", PushesRate(b=table))])
    source.save_param_groups(True)
    source.step()
    source.state[table]["momentum1"].fill_(3.0)
    source.param_groups[1]["lr"] = 0.75
    state_dict = copy.deepcopy(source.state_dict())
    target = CombinedOptimizer([adam(a=parameter(2)), ("x", PushesRate(b=parameter(3)))])
    target.save_param_groups(True)
    target.init_state()
    target.load_state_dict(state_dict)
    torch.testing.assert_close(target.state_dict()["state"], state_dict["state"])
    assert target.state_dict()["param_groups"] == state_dict["param_groups"]
    assert target.optimizers[1][1].num_loads == 1
    assert [group["lr"] for group in target.param_groups] == [0.1, 0.75]


def test_choice_to_save_groups_is_taken_over_and_handed_down():
    part = adam(a=parameter(2))
    part.save_param_groups(True)
    combined = CombinedOptimizer([part, sgd(b=parameter(2))])
    assert len(combined.state_dict()["param_groups"]) == 2
    assert "param_groups" in OptimizerWrapper(part).state_dict()
    combined.save_param_groups(False)
    assert "param_groups" not in part.state_dict()


def test_combined_closure_runs_once():
    first, second = parameter(2), parameter(2)
    optimizer = CombinedOptimizer([sgd(a=first), sgd(b=second)])
    losses = []

    def closure():
        losses.append(first.sum() + second.sum())
        optimizer.zero_grad()
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) == 4.0
    assert len(losses) == 1
    assert torch.cat([first, second]).tolist() == pytest.approx([0.8] * 4)


def test_combined_init_state_takes_full_names():
    def sparse_adam(tensors):
        return torch.optim.SparseAdam(tensors)

    table, dense = parameter(3, 2), parameter(3)
    tables = KeyedOptimizerWrapper({"weight": table}, sparse_adam)
    optimizer = CombinedOptimizer([("table", tables), adam(weight=dense)])
    optimizer.init_state({"table.weight"})
    assert optimizer.state_dict()["state"].keys() == {"table.weight", "weight"}
    assert table.tolist() == [[1, 1]] * 3
    with pytest.raises(ValueError, match=r"no parameters named \['tables.weight'\]"):
        optimizer.init_state({"tables.weight"})


def test_combined_refuses_names_and_tensors_that_come_twice():
    param = parameter(2)
    with pytest.raises(ValueError, match=r"two optimizers have a parameter 'x\.a'.*prefix"):
        CombinedOptimizer([("x", adam(a=parameter(2))), adam(**{"x.a": parameter(2)})])
    with pytest.raises(ValueError, match=r"'a' and 'x\.a' are one tensor"):
        CombinedOptimizer([adam(a=param), ("x", sgd(a=param))])


@pytest.mark.parametrize("wrap", [lambda part: CombinedOptimizer([("x", part)]), OptimizerWrapper])
@pytest.mark.usefixtures("no_shape_checks")
def test_plain_optimizers_are_refused(wrap):
    plain = torch.optim.SGD([parameter(2)], lr=0.1)
    with pytest.raises(TypeError, match=r"got SGD; make one with KeyedOptimizerWrapper\("):
        wrap(plain)


def test_wrapper_passes_everything_on():
    param = parameter(3)
    inner = PushesRate(a=param)
    wrapper = OptimizerWrapper(inner)
    wrapper.param_groups[0]["lr"] = 0.125
    wrapper.step()
    wrapper.zero_grad()
    wrapper.load_state_dict({"state": {"a": {"momentum1": torch.full((3,), 7.0)}}})
    assert inner.pushed == [0.125, 0.125]
    assert inner.num_loads == 1
    assert inner.state[param]["momentum1"].tolist() == [7, 7, 7]


def test_wrappers_nest():
    first, second = parameter(2), parameter(2)
    warm = WarmupOptimizer(adam(a=first), [WarmupStage(max_iters=4, value=0.5)], lr=0.1)
    optimizer = OptimizerWrapper(CombinedOptimizer([("x", warm), sgd(b=second)]))
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert state_dict["state"].keys() == {"x.a", "x.__warmup"}
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (0.5 + 0.5 / 4))


def test_schedulers_of_momentum_work_on_wrappers():
    inner = KeyedOptimizerWrapper(
        {"a": parameter(2)}, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
    )
    optimizer = OptimizerWrapper(inner)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4, max_momentum=0.8)
    assert inner.param_groups[0]["momentum"] == 0.8


def test_load_is_told_through_all_wrappers():
    fused = PushesRate(a=parameter(3))
    optimizer = OptimizerWrapper(WarmupOptimizer(CombinedOptimizer([fused]), []))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fused.num_loads == 1


def test_step_hooks_run_once():
    optimizer = OptimizerWrapper(CombinedOptimizer([sgd(a=parameter(2))]))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["after"]


def test_fused_surface_is_abstract_and_makes_no_state():
    with pytest.raises(TypeError, match="abstract"):
        FusedOptimizer({}, {}, [])
    with pytest.raises(TypeError, match="abstract"):
        FusedOptimizerModule()
    fused = PushesRate(a=parameter(3))
    fused.init_state()
    assert fused.pushed == []
    assert isinstance(fused, KeyedOptimizer)
