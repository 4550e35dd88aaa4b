"""Rules bound to tables: in backward, at the step, by tags; state dicts; learning rates."""

import warnings

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import (
    LAMB,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RowWiseAdagrad,
    apply_optimizer_in_backward,
    clip_grad_norm_,
    in_backward,
    in_backward_optimizer_filter,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

LENGTHS = torch.tensor([2, 0, 3, 1, 1, 2])


class Model(nn.Module):
    """Two tables and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse = EmbeddingBagCollection(
            [EmbeddingBagConfig(10, 4, "a"), EmbeddingBagConfig(10, 8, "b")]
        )
        self.dense = nn.Linear(12, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.dense(self.sparse(features).values()).square().sum()


def batch(seed: int) -> KeyedJaggedTensor:
    ids = torch.randint(0, 10, (9,), generator=torch.Generator().manual_seed(seed))
    return KeyedJaggedTensor(["a", "b"], ids, lengths=LENGTHS)


def train_plain(optimizer_class, steps=3, **options) -> Model:
    """Train the tables with a PyTorch optimizer and dense gradients."""
    model = Model()
    optimizer = optimizer_class(model.sparse.parameters(), **options)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return model


def train_fused(optimizer_class, steps=3, when="backward", **options) -> Model:
    model = Model()
    optimizer = in_backward(model, optimizer_class, when=when, **options)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return model


def assert_tables_equal(model: Model, other: Model, tolerance=1e-6) -> None:
    for ours, theirs in zip(model.sparse.parameters(), other.sparse.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("when", ["backward", "step"])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3}),
        (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-3}),
    ],
)
def test_rules_without_memory_of_untouched_rows_equal_dense_optimizers(
    optimizer_class, options, when
):
    """Rules that leave rows without gradient alone equal the dense optimizer on all rows."""
    assert_tables_equal(
        train_fused(optimizer_class, when=when, **options), train_plain(optimizer_class, **options)
    )


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_equals_the_dense_optimizer_in_its_first_step(optimizer_class):
    """Later steps differ by design: only touched rows move."""
    options = {"lr": 0.1, "weight_decay": 0.0}
    assert_tables_equal(
        train_fused(optimizer_class, 1, **options), train_plain(optimizer_class, 1, **options)
    )


@pytest.mark.parametrize("rule", [LAMB, Adam, LarsSGD, PartialRowWiseAdam, PartialRowWiseLAMB])
def test_every_rule_trains_alike_in_backward_and_at_the_step(rule):
    options = {"lr": 0.1, "weight_decay": 0.01, "max_gradient": 3.0}
    late = train_fused(rule, when="step", **options)
    assert_tables_equal(train_fused(rule, **options), late, 0)
    assert not torch.equal(late.sparse.embedding_bags["a"].weight,
                           Model().sparse.embedding_bags["a"].weight)  # fmt: skip


def test_in_backward_stores_no_gradient_and_leaves_the_rest_alone():
    model = Model()
    in_backward(model, RowWiseAdagrad, lr=0.1)
    model(batch(0)).backward()
    assert all(parameter.grad is None for parameter in model.sparse.parameters())
    assert model.dense.weight.grad is not None


def test_step_adds_up_micro_batches():
    model, whole = Model(), Model()
    optimizer = in_backward(model, RowWiseAdagrad, lr=0.1, when="step")
    for seed in (0, 1):
        model(batch(seed)).backward()
    optimizer.step()
    dense = RowWiseAdagrad(whole.sparse.parameters(), lr=0.1)
    (whole(batch(0)) + whole(batch(1))).backward()
    dense.step()
    assert_tables_equal(model, whole, 1e-5)


def test_step_works_with_grad_scaler():
    model, plain = Model(), train_plain(torch.optim.SGD, 1, lr=0.1)
    optimizer = in_backward(model, torch.optim.SGD, lr=0.1, when="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)
    assert_tables_equal(model, plain)


def test_grad_scaler_skips_a_step_with_infinite_gradients():
    model = Model()
    optimizer = in_backward(model, torch.optim.SGD, lr=0.1, when="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(batch(0)) * float("inf")).backward()
    scaler.step(optimizer)
    assert_tables_equal(model, Model(), 0)


def test_step_is_clipped_by_a_global_norm():
    model, plain = Model(), Model()
    optimizer = in_backward(model, torch.optim.SGD, lr=0.1, when="step")
    model(batch(0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    plain(batch(0)).backward()
    wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    torch.optim.SGD(plain.sparse.parameters(), lr=0.1).step()
    torch.testing.assert_close(norm, wanted)
    assert_tables_equal(model, plain)


def test_learning_rate_of_param_groups_reaches_the_rule():
    model, still = Model(), Model()
    optimizer = in_backward(model, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
    optimizer.zero_grad()
    model(batch(0)).backward()
    scheduler.optimizer.step()
    assert_tables_equal(model, still, 0)


def test_state_dict_has_parameter_names_and_logical_shapes():
    model = Model()
    optimizer = in_backward(model, PartialRowWiseAdam, lr=0.1)
    model(batch(0)).backward()
    state = optimizer.state_dict()["state"]
    assert list(state) == ["sparse.embedding_bags.a.weight", "sparse.embedding_bags.b.weight"]
    shapes = {k: tuple(v.shape) for k, v in state["sparse.embedding_bags.b.weight"].items()}
    assert shapes == {"exp_avg": (10, 8), "exp_avg_sq": (10,), "step": ()}


def test_training_continues_from_a_loaded_state():
    model = Model()
    optimizer = in_backward(model, PartialRowWiseAdam, lr=0.1)
    model(batch(0)).backward()
    twin = Model()
    other = in_backward(twin, PartialRowWiseAdam, lr=0.1)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each in (model, twin):
        each(batch(1)).backward()
    assert_tables_equal(model, twin, 0)


def apply_of_torch(*arguments) -> None:
    with warnings.catch_warnings():  # torch 2.13 scripts on this import, and warns of scripting
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(*arguments)


@pytest.mark.parametrize("apply", [apply_optimizer_in_backward, apply_of_torch])
def test_tags_fuse_the_rule(apply):
    model = Model()
    apply(RowWiseAdagrad, model.sparse.parameters(), {"lr": 0.1, "eps": 1e-3})
    for step in range(3):
        model(batch(step)).backward()
    assert_tables_equal(model, train_plain(RowWiseAdagrad, lr=0.1, eps=1e-3))
    assert all(parameter.grad is None for parameter in model.sparse.parameters())
    (optimizer,) = model.sparse.fused_optimizers
    state = optimizer.state_dict()["state"]["embedding_bags.a.weight"]
    assert state["step"] == 3


def test_tags_with_different_options_are_different_rules():
    model = Model()
    a, b = model.sparse.parameters()
    apply_optimizer_in_backward(torch.optim.SGD, [a], {"lr": 0.0})
    apply_optimizer_in_backward(torch.optim.SGD, [b], {"lr": 0.1})
    model(batch(0)).backward()
    still = Model()
    assert torch.equal(a, still.sparse.embedding_bags["a"].weight)
    assert not torch.equal(b, still.sparse.embedding_bags["b"].weight)


def test_other_parameters_are_stepped_as_their_gradient_arrives():
    model, plain = Model(), Model()
    apply_optimizer_in_backward(torch.optim.SGD, model.dense.parameters(), {"lr": 0.1})
    model(batch(0)).backward()
    plain(batch(0)).backward()
    torch.optim.SGD(plain.dense.parameters(), lr=0.1).step()
    assert torch.equal(model.dense.weight, plain.dense.weight)


def test_filter_splits_parameters_by_owner():
    model = Model()
    in_backward(model, RowWiseAdagrad, lr=0.1)
    free = dict(in_backward_optimizer_filter(model.named_parameters()))
    owned = dict(in_backward_optimizer_filter(model.named_parameters(), include=True))
    assert list(free) == ["dense.weight", "dense.bias"]
    assert list(owned) == ["sparse.embedding_bags.a.weight", "sparse.embedding_bags.b.weight"]


@pytest.mark.parametrize(
    ("optimizer_class", "options", "message"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "rule 'sgd' has no option momentum=0.9"),
        (torch.optim.Adam, {"amsgrad": True}, "no option amsgrad=True"),
        (torch.optim.RMSprop, {"lr": 0.1}, "no update rule for RMSprop; there are: Adagrad"),
        (RowWiseAdagrad, {"lr": -1.0}, "lr must be at least 0"),
        (RowWiseAdagrad, {"eps": 0.0}, "eps must be above 0"),
        (RowWiseAdagrad, {"learning_rat": 0.1}, "no option learning_rat"),
    ],
)
def test_what_no_rule_does_is_refused(optimizer_class, options, message):
    with pytest.raises(ValueError, match=message):
        in_backward(Model(), optimizer_class, **options)


def test_options_equal_to_the_default_are_accepted():
    assert in_backward(Model(), torch.optim.SGD, lr=0.1, momentum=0, nesterov=False)


def test_a_module_without_tables_is_refused():
    with pytest.raises(ValueError, match="Linear holds no embedding tables"):
        in_backward(nn.Linear(1, 1), RowWiseAdagrad)
