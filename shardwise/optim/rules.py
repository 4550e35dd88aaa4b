"""From an optimizer's class and keyword arguments to an update rule of the lookup operators."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.ops.lookup import Rule, Settings
from shardwise.ops.lookup import rules as row_rules
from shardwise.optim import placeholders
from shardwise.optim.rowwise_adagrad import RowWiseAdagrad


@dataclass(frozen=True, kw_only=True)
class BoundRule:
    """An update rule with its numbers.

    Attributes:
        rule: What happens to a touched row.
        settings: The rule's numbers.
        lr: The learning rate at the start.
        initial_state: Where a sum of squared gradients starts.
        rounds_stochastically: Round fp16 and bf16 rows up or down at random, without bias.
    """

    rule: Rule
    settings: Settings
    lr: float
    initial_state: float = 0.0
    rounds_stochastically: bool = True


@dataclass(frozen=True)
class _Kind:
    """A rule, and whether a class means its weight decay decoupled from the gradient."""

    rule: Rule
    is_decoupled: bool


_KINDS: dict[type, _Kind] = {
    torch.optim.SGD: _Kind(row_rules.SGD, False),
    torch.optim.Adagrad: _Kind(row_rules.ADAGRAD, False),
    torch.optim.Adam: _Kind(row_rules.ADAM, False),
    torch.optim.AdamW: _Kind(row_rules.ADAM, True),
    RowWiseAdagrad: _Kind(row_rules.ROW_WISE_ADAGRAD, False),
    placeholders.SGD: _Kind(row_rules.SGD, False),
    placeholders.Adagrad: _Kind(row_rules.ADAGRAD, False),
    placeholders.Adam: _Kind(row_rules.ADAM, True),
    placeholders.PartialRowWiseAdam: _Kind(row_rules.PARTIAL_ROW_WISE_ADAM, True),
    placeholders.LAMB: _Kind(row_rules.LAMB, True),
    placeholders.PartialRowWiseLAMB: _Kind(row_rules.PARTIAL_ROW_WISE_LAMB, True),
    placeholders.LarsSGD: _Kind(row_rules.LARS_SGD, True),
}

# Spellings of the field, and ours.
_ALIASES = {"learning_rate": "lr"}


def bind_rule(optimizer_class: type, **options: Any) -> BoundRule:
    """Give the rule that an optimizer class names, with its options.

    What is not given keeps the default of the class. Beside the options of the class, any rule
    takes `decoupled` (weight decay shrinks the row instead of joining the gradient),
    `max_gradient` (clips the elements of the summed row gradient) and `stochastic_rounding`.

    Args:
        optimizer_class: One of PyTorch's SGD, Adagrad, Adam, AdamW, or of `shardwise.optim`.
        options: Keyword arguments of the class.

    Raises:
        ValueError: No rule does what the class or the option asks.
    """
    kind = _KINDS.get(optimizer_class)
    if kind is None:
        known = ", ".join(sorted({cls.__name__ for cls in _KINDS}))
        raise ValueError(f"no update rule for {optimizer_class.__name__}; there are: {known}")
    options = {_ALIASES.get(name, name): value for name, value in options.items()}
    defaults = _defaults(optimizer_class)
    known_names = _known_names(kind.rule)
    for name, value in options.items():
        if name not in known_names and not (name in defaults and value == defaults[name]):
            raise ValueError(
                f"rule {kind.rule.name!r} has no option {name}={value!r}; "
                f"it takes {', '.join(sorted(known_names))}"
            )
    chosen = {name: value for name, value in defaults.items() if name in known_names} | options
    return _read(kind, chosen)


def _defaults(optimizer_class: type) -> dict[str, Any]:
    parameters = inspect.signature(optimizer_class).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _known_names(rule: Rule) -> set[str]:
    names = {"lr", "weight_decay", "decoupled", "max_gradient", "stochastic_rounding"}
    names |= set(rule.settings)
    if "beta1" in names:
        names.add("betas")
    if any(name == "sum" for name, _ in rule.states):
        names.add("initial_accumulator_value")
    return names


def _read(kind: _Kind, chosen: Mapping[str, Any]) -> BoundRule:
    numbers = {name: chosen[name] for name in kind.rule.settings if name in chosen}
    if "betas" in chosen:
        numbers = {**dict(zip(("beta1", "beta2"), chosen["betas"], strict=True)), **numbers}
    lr = float(chosen["lr"])
    if not lr >= 0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    settings = Settings(
        weight_decay=float(chosen.get("weight_decay", 0.0)),
        decoupled=bool(chosen.get("decoupled", kind.is_decoupled)),
        max_gradient=float(chosen.get("max_gradient", float("inf"))),
        **{name: float(value) for name, value in numbers.items()},
    )
    return BoundRule(
        rule=kind.rule,
        settings=settings,
        lr=lr,
        initial_state=float(chosen.get("initial_accumulator_value", 0.0)),
        rounds_stochastically=bool(chosen.get("stochastic_rounding", True)),
    )
