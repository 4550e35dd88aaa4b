"""Optimizers of tables: updates inside backward, or at the step with the same rules.

A collection of tables takes a rule by its `bind_rule` and gives back what the rule keeps. This
module finds such collections in a model, and holds the learning rate and the state of a binding.
"""

import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shardwise.ops.lookup import Update, apply_update
from shardwise.optim.keyed import FusedOptimizer
from shardwise.optim.rules import BoundRule, bind_rule

When = Literal["backward", "step"]


@dataclass(kw_only=True, eq=False)
class Binding:
    """A rule bound to some tables of one collection.

    Parts of tables may come and go (a collection is sharded after its rule was bound); the
    collection then fills the fields anew and calls `changed`.

    Attributes:
        rule: The rule and its numbers.
        update: The rule with its state, as the lookup runs it.
        parameters: The local parts of the tables, by parameter name within the collection, in the
            update's order.
        states: Per table, under the name of its first part, the rule's state by its name, `step`
            among it, each of the whole table's shape.
        first_parts: Per part, the position of the first part of its table.
        members: What the optimizer knows of all its bindings.
    """

    rule: BoundRule
    update: Update
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    first_parts: list[int] = field(default_factory=list)
    members: "Members | None" = None

    def changed(self) -> None:
        """Tell the optimizer, if there is one, that the fields were filled anew."""
        if self.members is not None:
            self.members.gather()


class Members:
    """The parameters and states of an optimizer's bindings, in containers that stay the same.

    Attributes:
        bindings: By the name of their module.
        params: Each table's first part by name.
        state: The state of a table, by its first part.
        parts: All parts.
    """

    def __init__(self, bindings: Mapping[str, Binding]) -> None:
        """Gather the members, now and at each change of a binding."""
        self.bindings = dict(bindings)
        self.params: dict[str, Tensor] = {}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.parts: list[Tensor] = []
        for binding in self.bindings.values():
            binding.members = self
        self.gather()

    def gather(self) -> None:
        """Fill the containers from the bindings."""
        for container in (self.params, self.state, self.parts):
            container.clear()
        for path, binding in self.bindings.items():
            self.parts.extend(binding.parameters.values())
            for name, state in binding.states.items():
                parameter = binding.parameters[name]
                self.params[f"{path}.{name}" if path else name] = parameter
                self.state[parameter] = state


@runtime_checkable
class HoldsTables(Protocol):
    """A module whose tables can be updated in backward."""

    def table_parameters(self) -> dict[str, nn.Parameter]:
        """The tables' parameters, by their name in the module."""

    def bind_rule(
        self, rule: BoundRule, lr: Tensor, *, in_backward: bool, parameters: Iterable[str]
    ) -> Binding:
        """Let a rule update some of the tables from now on."""


def table_holders(module: nn.Module) -> Iterator[tuple[str, HoldsTables]]:
    """Find the modules that hold tables, with their names; what they hold is not searched."""
    if isinstance(module, HoldsTables):
        yield "", module
        return
    for name, child in module.named_children():
        for inner, holder in table_holders(child):
            yield f"{name}.{inner}" if inner else name, holder


class TableOptimizer(FusedOptimizer):
    """The optimizer of tables that a rule updates.

    With rules that run in backward, `step` and `zero_grad` change no weight: they hand the
    learning rate of `param_groups` to the rule. With `when="step"`, `step` runs the rule on the
    row-sparse gradients, which by then may have been added over micro-batches, unscaled or clipped.

    The state dict has the names of the parameters as keys, and logical shapes: [rows] or
    [rows, columns], `step` a number.
    """

    def __init__(self, bindings: Mapping[str, Binding], rule: BoundRule, lr: Tensor) -> None:
        """Gather bindings, by the name of their module, that share one rule and one `lr`."""
        self._lr = lr
        self._members = members = Members(bindings)
        group = {"params": members.parts, "lr": rule.lr, "rule": rule.rule.name}
        group |= {name: getattr(rule.settings, name) for name in rule.rule.settings}
        group["weight_decay"] = rule.settings.weight_decay
        super().__init__(members.params, members.state, [group])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Hand over the learning rate; run the rules that wait for the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._push_lr()
        for binding in self._members.bindings.values():
            if not binding.update.in_backward:
                _run(binding)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Hand over the learning rate and drop the gradients."""
        self._push_lr()
        for binding in self._members.bindings.values():
            for parameter in binding.parameters.values():
                parameter.grad = None

    def post_load_state_dict(self) -> None:
        """Let all parts of a table count the loaded number of steps."""
        for binding in self._members.bindings.values():
            steps = binding.update.steps
            steps.copy_(steps[binding.first_parts])

    def _push_lr(self) -> None:
        self._lr.fill_(float(self.param_groups[0]["lr"]))


def _run(binding: Binding) -> None:
    rows, grads = [], []
    tables = list(binding.parameters.values())
    for table in tables:
        if table.grad is None:
            rows.append(torch.empty(0, dtype=torch.int64, device=table.device))
            grads.append(table.new_empty(0, table.shape[1]))
        elif table.grad.is_sparse:  # uncoalesced is fine: the rule adds the rows up
            rows.append(table.grad._indices()[0])
            grads.append(table.grad._values())
        else:
            rows.append(torch.arange(table.shape[0], device=table.device))
            grads.append(table.grad)
    apply_update(binding.update, tables, rows, grads)


def in_backward(
    module: nn.Module, optimizer_class: type, *, when: When = "backward", **options: Any
) -> TableOptimizer:
    """Let a rule update every table of a module; the other parameters keep their optimizer.

    With `when="backward"` a table is updated as its gradient arrives and no gradient is stored;
    a table that is looked up twice before one backward is updated twice, one after the other.
    With `when="step"` backward leaves a row-sparse gradient and the optimizer's `step` runs the
    rule: gradient accumulation, GradScaler and clipping by a global norm need this one.

    Args:
        module: A collection of tables, or a model that has some.
        optimizer_class: Names the rule: PyTorch's SGD, Adagrad, Adam, AdamW, or one of
            `shardwise.optim`.
        when: When the rule runs.
        options: The options of the class, and those of `optim.rules.bind_rule`.

    Returns:
        An optimizer that holds the learning rate and the state. Call its `step` as any other's.

    Raises:
        ValueError: There is no table, a table already has a rule, or the rule lacks an option.
    """
    holders = dict(table_holders(module))
    if not holders:
        raise ValueError(f"in_backward: {type(module).__name__} holds no embedding tables")
    if when not in ("backward", "step"):
        raise ValueError(f"in_backward: when must be 'backward' or 'step', got {when!r}")
    rule = bind_rule(optimizer_class, **options)
    lr = torch.tensor(rule.lr, dtype=torch.float32)
    bindings = {}
    for path, holder in holders.items():
        parameters = holder.table_parameters()
        is_fused = when == "backward"
        bindings[path] = holder.bind_rule(rule, lr, in_backward=is_fused, parameters=parameters)
        tag(parameters.values(), optimizer_class, options)
    return TableOptimizer(bindings, rule, lr)


def tag(parameters: Iterable[nn.Parameter], optimizer_class: type, options: Any) -> None:
    """Note on parameters which optimizer runs in backward, as PyTorch's own tags do."""
    for parameter in parameters:
        vars(parameter).setdefault("_optimizer_classes", []).append(optimizer_class)
        vars(parameter).setdefault("_optimizer_kwargs", []).append(dict(options))


def read_tags(parameters: Mapping[str, nn.Parameter]) -> list[tuple[type, Any, list[str]]]:
    """Group parameters by their tag: (optimizer class, options, names). Untagged ones are left out.

    Raises:
        ValueError: A parameter has two tags.
    """
    groups: list[tuple[type, Any, list[str]]] = []
    for name, parameter in parameters.items():
        classes: Sequence[type] = getattr(parameter, "_optimizer_classes", ())
        if not classes:
            continue
        if len(classes) > 1:
            raise ValueError(f"parameter {name!r} is tagged with {len(classes)} optimizers, not 1")
        options = vars(parameter)["_optimizer_kwargs"][0]
        for cls, known, names in groups:
            if cls is classes[0] and known == options:
                names.append(name)
                break
        else:
            groups.append((classes[0], options, [name]))
    return groups


def apply_optimizer_in_backward(
    optimizer_class: type[torch.optim.Optimizer],
    params: Iterable[nn.Parameter],
    optimizer_kwargs: dict[str, Any],
) -> None:
    """Tag parameters so that their optimizer runs in backward.

    Embedding tables run the rule of the class fused, from their collection's next forward on. Any
    other parameter gets an optimizer of its own, run as soon as its gradient is there.

    Args:
        optimizer_class: A PyTorch optimizer, or for tables one of `shardwise.optim`.
        params: The parameters, usually of one module.
        optimizer_kwargs: Keyword arguments of the class.
    """
    others = []
    for parameter in params:
        if getattr(parameter, "is_table", False):
            tag([parameter], optimizer_class, optimizer_kwargs)
        else:
            others.append(parameter)
    if others:
        _step_as_gradients_arrive(optimizer_class, others, optimizer_kwargs)


def _step_as_gradients_arrive(
    optimizer_class: type[torch.optim.Optimizer],
    params: list[nn.Parameter],
    options: dict[str, Any],
) -> None:
    with warnings.catch_warnings():  # torch 2.13 scripts on this import, and warns of scripting
        warnings.simplefilter("ignore", DeprecationWarning)
        optim = importlib.import_module("torch.distributed.optim")
    optim._apply_optimizer_in_backward(optimizer_class, params, options)


def in_backward_optimizer_filter(
    named_parameters: Iterable[tuple[str, nn.Parameter]], include: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that no optimizer owns yet, or with `include` those that one does.

    A parameter is owned when `in_backward` or `apply_optimizer_in_backward` has seen it.
    """
    for name, parameter in named_parameters:
        if is_owned(parameter) == include:
            yield name, parameter


def is_owned(parameter: nn.Parameter) -> bool:
    """Whether an optimizer that runs in backward owns a parameter."""
    return hasattr(parameter, "_optimizer_classes")
