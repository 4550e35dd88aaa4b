"""State dicts by parameter name: what they hold, round trips, and all that a load refuses."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from shardwise.optim import KeyedOptimizer, KeyedOptimizerWrapper, RowWiseAdagrad

FACTORIES = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.2),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "row_wise_adagrad": lambda params: RowWiseAdagrad(params, lr=0.1),
}


def make_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in {"over.weight": (4, 3), "bias": (3,)}.items()
    }


def take_steps(params, optimizer, num_steps=2):
    for step in range(num_steps):
        for param in params.values():
            param.grad = param.detach().cos() + step
        optimizer.step()


def trained(factory="adam", seed=0):
    params = make_params(seed)
    optimizer = KeyedOptimizerWrapper(params, FACTORIES[factory])
    take_steps(params, optimizer)
    return params, optimizer


def keyed(params, state=None, **options):
    """An optimizer made from its parts alone."""
    return KeyedOptimizer(params, state or {}, [{"params": [*params.values()], **options}])


def test_state_dict_is_keyed_by_parameter_name():
    params, optimizer = trained("row_wise_adagrad")
    state_dict = optimizer.state_dict()
    assert state_dict.keys() == {"state"}
    assert state_dict["state"].keys() == params.keys()
    assert state_dict["state"]["over.weight"].keys() == {"step", "sum"}


def test_groups_are_saved_when_asked_with_their_names_sorted():
    _, optimizer = trained("momentum")
    optimizer.save_param_groups(True)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["params"] == ["bias", "over.weight"]
    assert group["lr"] == 0.1
    optimizer.save_param_groups(False)
    assert "param_groups" not in optimizer.state_dict()


def save_by_torch(optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "state.pt")


def load_by_torch(optimizer, folder):
    optimizer.load_state_dict(torch.load(folder / "state.pt"))


def save_by_checkpoint(optimizer, folder):
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder, no_dist=True)


def load_by_checkpoint(optimizer, folder):
    state_dict = {"optimizer": optimizer.state_dict()}
    dcp.load(state_dict, checkpoint_id=folder, no_dist=True)
    optimizer.load_state_dict(state_dict["optimizer"])


def save_stateful(optimizer, folder):
    dcp.save({"optimizer": optimizer}, checkpoint_id=folder, no_dist=True)


def load_stateful(optimizer, folder):
    dcp.load({"optimizer": optimizer}, checkpoint_id=folder, no_dist=True)


ROUTES = [
    (save_by_torch, load_by_torch),
    (save_by_checkpoint, load_by_checkpoint),
    (save_stateful, load_stateful),
]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(("save", "load"), ROUTES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
def test_training_goes_on_alike_after_a_round_trip(factory, save, load, tmp_path):
    params, optimizer = trained(factory)
    optimizer.save_param_groups(True)
    optimizer.param_groups[0]["lr"] = 0.05
    save(optimizer, tmp_path)
    resumed = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    other = KeyedOptimizerWrapper(resumed, FACTORIES[factory])
    other.save_param_groups(True)
    other.init_state()
    load(other, tmp_path)
    take_steps(params, optimizer)
    take_steps(resumed, other)
    torch.testing.assert_close(resumed, params, rtol=0, atol=0)


def test_load_copies_into_the_tensors_that_are_there():
    _, optimizer = trained()
    params, other = trained(seed=1)
    before = other.state[params["bias"]]["exp_avg"]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[params["bias"]]["exp_avg"] is before
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict())


def test_load_replaces_numbers_and_not_those_of_the_given_state():
    param = nn.Parameter(torch.ones(2))
    optimizer = keyed({"a": param}, {param: {"count": 1, "seen": [1]}})
    given = {"state": {"a": {"count": 5, "seen": [1, 2]}}}
    optimizer.load_state_dict(given)
    given["state"]["a"]["seen"].append(3)
    assert optimizer.state[param] == {"count": 5, "seen": [1, 2]}


def test_load_keeps_what_was_loaded_in_place():
    param, held = nn.Parameter(torch.ones(2)), object()
    optimizer = keyed({"a": param}, {param: {"rows": held}})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["rows"] is held


def test_saved_options_are_copies():
    optimizer = keyed({"a": nn.Parameter(torch.ones(2))}, milestones=[1])
    optimizer.save_param_groups(True)
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["milestones"].append(2)
    assert saved["param_groups"] == [{"params": ["a"], "milestones": [1]}]


def test_load_leaves_groups_alone_unless_asked():
    _, optimizer = trained()
    optimizer.save_param_groups(True)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = 0.5
    optimizer.save_param_groups(False)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_load_finds_groups_by_their_names():
    params = make_params()
    groups = [{"params": [param], "lr": 0.1} for param in params.values()]
    optimizer = KeyedOptimizer(params, {}, groups)
    optimizer.save_param_groups(True)
    given = [{"params": ["bias"], "lr": 0.3}, {"params": ["over.weight"], "lr": 0.2}]
    optimizer.load_state_dict({"state": {}, "param_groups": given})
    assert [group["lr"] for group in groups] == [0.2, 0.3]


def test_schedulers_change_the_wrapped_optimizer():
    params = make_params()
    optimizer = KeyedOptimizerWrapper(params, FACTORIES["sgd"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    take_steps(params, optimizer, 1)
    scheduler.step()
    before = params["bias"].detach().clone()
    params["bias"].grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(params["bias"].detach(), before - 0.05)


def test_zero_grad_and_closure_reach_the_wrapped_optimizer():
    params = make_params()
    optimizer = KeyedOptimizerWrapper(params, FACTORIES["sgd"])

    def closure():
        optimizer.zero_grad()
        loss = params["bias"].sum()
        loss.backward()
        return loss

    before = params["bias"].detach().clone()
    assert optimizer.step(closure) == before.sum()
    torch.testing.assert_close(params["bias"].detach(), before - 0.1)
    assert params["over.weight"].grad is None


@pytest.mark.parametrize("factory", FACTORIES)
def test_init_state_makes_state_and_changes_nothing_else(factory):
    params = make_params()
    before = copy.deepcopy(params)
    params["bias"].grad = torch.ones(3)
    optimizer = KeyedOptimizerWrapper(params, FACTORIES[factory])
    optimizer.init_state()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert params["bias"].grad.tolist() == [1, 1, 1]
    assert params["over.weight"].grad is None
    optimizer.load_state_dict(trained(factory)[1].state_dict())


def test_init_state_leaves_existing_state_alone():
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.init_state()
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_init_state_with_row_sparse_gradients():
    params = make_params()
    optimizer = KeyedOptimizerWrapper(params, torch.optim.SparseAdam)
    optimizer.init_state(sparse_grad_parameter_names=list(params))
    assert optimizer.state_dict()["state"]["over.weight"]["exp_avg"].shape == (4, 3)


def test_init_state_skips_frozen_parameters():
    params = make_params()
    params["bias"].requires_grad_(False)
    optimizer = KeyedOptimizerWrapper(params, FACTORIES["adam"])
    optimizer.init_state()
    assert optimizer.state_dict()["state"].keys() == {"over.weight"}


def test_init_state_refuses_unknown_names():
    _, optimizer = trained()
    with pytest.raises(ValueError, match=r"no parameters named \['b'\].*'bias'"):
        optimizer.init_state({"b"})


def without_parameter(state):
    del state["bias"]


def with_unknown_parameter(state):
    state["head"] = state["bias"]


def without_key(state):
    del state["bias"]["exp_avg"]


def with_unknown_key(state):
    state["bias"]["momentum"] = 0.5


def with_other_shape(state):
    state["over.weight"]["exp_avg"] = torch.zeros(5, 3)


def with_other_kind(state):
    state["over.weight"]["step"] = 2.0


REFUSED = [
    (without_parameter, r"missing \['bias'\], unknown \[\]"),
    (with_unknown_parameter, r"missing \[\], unknown \['head'\]"),
    (without_key, r"parameter 'bias', state: missing \['exp_avg'\]"),
    (with_unknown_key, r"parameter 'bias', state: missing \[\], unknown \['momentum'\]"),
    (
        with_other_shape,
        r"parameter 'over.weight', state 'exp_avg': has shape \(4, 3\), got \(5, 3\)",
    ),
    (with_other_kind, r"parameter 'over.weight', state 'step': is of type Tensor, got float"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_load_refuses_what_does_not_fit_before_it_changes_anything(change, message):
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(trained(seed=1)[1].state_dict())
    change(given["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(given)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_load_before_the_first_step_says_to_init_state():
    optimizer = KeyedOptimizerWrapper(make_params(), FACTORIES["adam"])
    with pytest.raises(ValueError, match=r"unknown \['bias', 'over.weight'\].*call init_state\(\)"):
        optimizer.load_state_dict(trained()[1].state_dict())


def test_load_without_an_entry_is_refused():
    _, optimizer = trained()
    with pytest.raises(ValueError, match="has no 'state', only"):
        optimizer.load_state_dict({"weights": {}})
    state_dict = optimizer.state_dict()
    optimizer.save_param_groups(True)
    with pytest.raises(ValueError, match="has no 'param_groups', only"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": ["a", "b"], "lr": 0.1}], r"missing \[\('a',\)\], unknown \[\('a', 'b'\)\]"),
        ([{"params": ["a"]}], r"param group of \['a'\], option: missing \['lr'\]"),
        ([{"params": ["a"], "lr": torch.ones(())}], "option 'lr': is of type float, got Tensor"),
    ],
)
def test_load_refuses_groups_that_do_not_fit(groups, message):
    optimizer = keyed({"a": nn.Parameter(torch.ones(2))}, lr=0.2)
    optimizer.save_param_groups(True)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({"state": {}, "param_groups": groups})


def test_every_tensor_needs_one_name():
    param, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor"):
        keyed({"a": param, "b": param})
    with pytest.raises(ValueError, match=r"state: tensor \(3,\) is none of the parameters \['a'\]"):
        keyed({"a": param}, {other: {}})
    with pytest.raises(ValueError, match="state: 'b' is none of the parameters"):
        keyed({"a": param}, {"b": {}})
    with pytest.raises(ValueError, match=r"param_groups: tensor \(3,\) is none"):
        KeyedOptimizer({"a": param}, {}, [{"params": [param, other]}])


def test_added_group_must_have_names():
    param, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = KeyedOptimizer({"a": param, "b": other}, {}, [{"params": [param]}])
    optimizer.add_param_group({"params": other})
    assert optimizer.param_groups[1]["params"] == [other]
    with pytest.raises(ValueError, match=r"the new group: tensor \(4,\) is none"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
