"""Learning rates in stages: each formula, changes of stage, resuming."""

import copy
import math

import pytest
import torch
from torch import nn

from shardwise.optim import KeyedOptimizerWrapper, WarmupOptimizer, WarmupPolicy, WarmupStage

P = WarmupPolicy


def warm(stages, lr=0.1, **options):
    param = nn.Parameter(torch.ones(2))
    inner = KeyedOptimizerWrapper({"a": param}, lambda params: torch.optim.Adam(params, lr=9.0))
    return WarmupOptimizer(inner, stages, lr=lr, **options)


def rates(optimizer, num_steps):
    """The learning rates of that many steps."""
    result = []
    for _ in range(num_steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.params["a"].grad = torch.ones(2)
        optimizer.step()
    return result


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (WarmupStage(P.NONE, 8), [1, 1, 1, 1]),
        (WarmupStage(P.LINEAR, 4, 0.2), [0.2, 0.4, 0.6, 0.8]),
        (WarmupStage(P.CONSTANT, 8, 0.3), [0.3, 0.3, 0.3, 0.3]),
        (WarmupStage(P.POLY, 4, 2.0), [1, 0.5625, 0.25, 0.0625]),
        (WarmupStage(P.POLY, 8, 1.0, decay_iters=2), [1, 0.5, 0, 0]),
        (WarmupStage(P.STEP, 8, 0.5), [1, 0.5, 0.25, 0.125]),
        (WarmupStage(P.STEP, 8, 0.5, decay_iters=2), [1, 1, 0.5, 0.5]),
        (WarmupStage(P.INVSQRT, 8), [1, 1, 1 / math.sqrt(2), 1 / math.sqrt(3)]),
        (
            WarmupStage(P.COSINE_ANNEALING_WARM_RESTARTS, 8, 0.2, sgdr_period=3),
            [1, 0.2 + 0.8 * 0.75, 0.2 + 0.8 * 0.25, 1],
        ),
        (WarmupStage(P.LINEAR, 4, 0.2, lr_scale=10.0), [2, 4, 6, 8]),
    ],
)
def test_policy_equals_its_formula(stage, expected):
    assert rates(warm([stage], lr=1.0), 4) == pytest.approx(expected)


def test_stages_follow_one_another_and_end_at_the_full_rate():
    stages = [WarmupStage(P.LINEAR, 2, 0.0), WarmupStage(P.STEP, 4, 0.5, lr_scale=2.0)]
    expected = [0.0, 0.5, 2 * 0.5**2, 2 * 0.5**3, 1.0, 1.0]
    assert rates(warm(stages, lr=1.0), 6) == pytest.approx(expected)


def test_without_stages_the_rate_is_the_full_one():
    assert rates(warm([], lr=0.25), 2) == [0.25, 0.25]


def test_resumed_run_goes_on_with_the_same_rates():
    stages = [WarmupStage(P.LINEAR, 3, 0.1), WarmupStage(P.POLY, 9, 2.0)]
    optimizer, resumed = warm(stages), warm(stages)
    rates(optimizer, 4)
    resumed.init_state()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert rates(resumed, 5) == rates(optimizer, 5)


def test_number_of_steps_is_saved_under_its_name():
    optimizer = warm([], param_name="schedule")
    rates(optimizer, 3)
    state = optimizer.state_dict()["state"]
    assert state.keys() == {"a", "schedule"}
    assert state["schedule"] == {"iteration": torch.tensor(3)}


def test_state_without_the_number_of_steps_is_refused():
    optimizer = warm([])
    rates(optimizer, 1)
    state_dict = optimizer.state_dict()
    del state_dict["state"]["__warmup"]
    with pytest.raises(ValueError, match=r"missing \['__warmup'\]"):
        optimizer.load_state_dict(state_dict)


def test_rate_that_is_a_tensor_is_filled():
    param, rate = nn.Parameter(torch.ones(2)), torch.tensor(9.0)
    inner = KeyedOptimizerWrapper(
        {"a": param}, lambda params: torch.optim.Adam(params, lr=rate, foreach=False)
    )
    optimizer = WarmupOptimizer(inner, [WarmupStage(P.CONSTANT, 5, 0.5)], lr=1.0)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_another_option_can_be_scheduled():
    optimizer = warm([WarmupStage(P.CONSTANT, 5, 0.5)], lr=0.01, lr_param="weight_decay")
    assert optimizer.param_groups[0]["weight_decay"] == 0.005
    assert optimizer.param_groups[0]["lr"] == 9.0


def test_step_gives_what_the_closure_returns():
    assert warm([]).step(lambda: torch.tensor(3.0)) == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warm([WarmupStage(max_iters=5)] * 2), "stage 1 ends at step 5, not after stage 0"),
        (lambda: warm([], lr_param="rate"), "group 0 has no 'rate'"),
        (lambda: warm([], param_name="a"), "there is a parameter 'a' already"),
        (lambda: WarmupStage(max_iters=0), "max_iters must be above 0, got 0"),
        (lambda: WarmupStage(sgdr_period=0), "sgdr_period must be above 0, got 0"),
        (lambda: WarmupStage(decay_iters=0), "decay_iters must be above 0, or -1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
