"""Update rules: what an optimizer does to one touched row, as data and as plain PyTorch.

A rule is a pair (row sums, apply). *Row sums* are the few numbers per row that need all of its
columns (squared gradient, norms); where the columns of a row lie on several ranks they are added
over ranks between the two. *Apply* then changes each column on its own. Both see the row before
the update, the summed gradient of the row and the rule's state. One rule needs sums of sums: it
takes the first sums of whole rows to make the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

StateShape = Literal["row", "element"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of a rule; each rule reads those it names in `Rule.settings`.

    Attributes:
        eps: Added to the denominator; above 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        momentum: Decay of the momentum buffer, in [0, 1).
        eta: Trust coefficient of LARS.
        weight_decay: 0 for none.
        decoupled: Shrink the row itself instead of adding the decay to its gradient (L2).
        max_gradient: Clip each element of the summed row gradient to this size; infinity for none.
    """

    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.9
    eta: float = 0.001
    weight_decay: float = 0.0
    decoupled: bool = False
    max_gradient: float = float("inf")

    def __post_init__(self) -> None:
        """Refuse values that no rule can work with."""
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not self.max_gradient > 0:
            raise ValueError(f"max_gradient must be above 0, got {self.max_gradient}")

    def as_floats(self) -> list[float]:
        """The settings in the order in which the operators take them."""
        return [
            self.eps,
            self.beta1,
            self.beta2,
            self.momentum,
            self.eta,
            self.weight_decay,
            float(self.decoupled),
            self.max_gradient,
        ]

    @staticmethod
    def from_floats(values: list[float]) -> "Settings":
        """The inverse of `as_floats`."""
        eps, beta1, beta2, momentum, eta, weight_decay, decoupled, max_gradient = values
        return Settings(
            eps=eps,
            beta1=beta1,
            beta2=beta2,
            momentum=momentum,
            eta=eta,
            weight_decay=weight_decay,
            decoupled=decoupled != 0,
            max_gradient=max_gradient,
        )


class Rows(NamedTuple):
    """Touched rows of one table, in float32: N rows of D columns.

    Attributes:
        weight: The rows [N, D] before the update.
        grad: Their summed gradients [N, D], clipped, with L2 decay added.
        states: Per state, [N] or [N, D]; `apply` changes them in place.
        step: The number of this update, from 1.
        width: Columns of the whole row, of which these D may be a part.
        settings: The rule's numbers.
    """

    weight: Tensor
    grad: Tensor
    states: list[Tensor]
    step: int
    width: int
    settings: Settings


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: In snake case; also in messages.
        code: Its number in the compiled operators.
        states: The name of each state, and whether it is a number per row or per element. All are
            float32.
        settings: The names in `Settings` that it reads, besides weight decay and `max_gradient`.
        num_sums: Row sums it needs.
        row_sums: From the rows, and from sums of whole rows where those of these columns are
            not all, to [N, num_sums].
        apply: From the rows, [N, num_sums] and lr to the step [N, D], to be subtracted from the
            rows; changes the states in place.
        num_early_sums: How many of the sums, the first ones, the others are made of.
    """

    name: str
    code: int
    states: tuple[tuple[str, StateShape], ...]
    settings: tuple[str, ...]
    num_sums: int
    row_sums: Callable[[Rows, Tensor | None], Tensor]
    apply: Callable[[Rows, Tensor, Tensor], Tensor]
    num_early_sums: int = 0


def _no_sums(rows: Rows, given: Tensor | None) -> Tensor:
    return rows.grad.new_empty(rows.grad.shape[0], 0)


def _sums(*columns: Tensor) -> Tensor:
    return torch.stack([column.sum(1) for column in columns], 1)


def _sgd(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    return lr * rows.grad


def _adagrad(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    (total,) = rows.states
    total += rows.grad**2
    return lr * rows.grad / (total.sqrt() + rows.settings.eps)


def _squared_gradient(rows: Rows, given: Tensor | None) -> Tensor:
    return _sums(rows.grad**2) if given is None else given


def _row_wise_adagrad(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    (total,) = rows.states
    total += sums[:, 0] / rows.width
    return (lr / (total.sqrt() + rows.settings.eps))[:, None] * rows.grad


def _first_moment(rows: Rows) -> Tensor:
    beta1 = rows.settings.beta1
    return beta1 * rows.states[0] + (1 - beta1) * rows.grad


def _second_moment(rows: Rows, squared: Tensor) -> Tensor:
    beta2 = rows.settings.beta2
    return beta2 * rows.states[1] + (1 - beta2) * squared


def _direction(rows: Rows, first: Tensor, second: Tensor) -> Tensor:
    """Adam's direction: both moments corrected for their start at zero."""
    settings = rows.settings
    first = first / (1 - settings.beta1**rows.step)
    second = second / (1 - settings.beta2**rows.step)
    return first / (second.sqrt() + settings.eps)


def _adam(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    rows.states[0].copy_(_first_moment(rows))
    rows.states[1].copy_(_second_moment(rows, rows.grad**2))
    return lr * _direction(rows, *rows.states)


def _partial_row_wise_adam(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    rows.states[0].copy_(_first_moment(rows))
    rows.states[1].copy_(_second_moment(rows, sums[:, 0] / rows.width))
    return lr * _direction(rows, rows.states[0], rows.states[1][:, None])


def _decay_in_trust(rows: Rows) -> float:
    return rows.settings.weight_decay if rows.settings.decoupled else 0.0


def _trust(weight_squared: Tensor, update_squared: Tensor) -> Tensor:
    """Norm of the row over norm of its update; 1 where either is zero."""
    ratio = weight_squared.sqrt() / update_squared.sqrt()
    return torch.where((weight_squared > 0) & (update_squared > 0), ratio, 1.0)


def _lamb_update(rows: Rows) -> Tensor:
    first, second = _first_moment(rows), _second_moment(rows, rows.grad**2)
    return _direction(rows, first, second) + _decay_in_trust(rows) * rows.weight


def _lamb_sums(rows: Rows, given: Tensor | None) -> Tensor:
    return _sums(rows.weight**2, _lamb_update(rows) ** 2) if given is None else given


def _lamb(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    update = _lamb_update(rows)
    first, second = _first_moment(rows), _second_moment(rows, rows.grad**2)
    rows.states[0].copy_(first)
    rows.states[1].copy_(second)
    return lr * _trust(sums[:, 0], sums[:, 1])[:, None] * update


def _partial_row_wise_lamb_update(rows: Rows, squared: Tensor) -> Tensor:
    """Give the update, from the squared gradient [N] of whole rows."""
    second = _second_moment(rows, squared / rows.width)[:, None]
    return _direction(rows, _first_moment(rows), second) + _decay_in_trust(rows) * rows.weight


def _partial_row_wise_lamb_sums(rows: Rows, given: Tensor | None) -> Tensor:
    squared = (rows.grad**2).sum(1) if given is None else given[:, 0]
    update = _partial_row_wise_lamb_update(rows, squared)
    return torch.cat([squared[:, None], _sums(rows.weight**2, update**2)], 1)


def _partial_row_wise_lamb(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    squared, weight_squared, update_squared = sums.unbind(1)
    update = _partial_row_wise_lamb_update(rows, squared)
    first, second = _first_moment(rows), _second_moment(rows, squared / rows.width)
    rows.states[0].copy_(first)
    rows.states[1].copy_(second)
    return lr * _trust(weight_squared, update_squared)[:, None] * update


def _norms(rows: Rows, given: Tensor | None) -> Tensor:
    return _sums(rows.weight**2, rows.grad**2) if given is None else given


def _lars_sgd(rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    (buffer,) = rows.states
    decay = _decay_in_trust(rows)
    weight_norm, grad_norm = sums.sqrt().unbind(1)
    bound = grad_norm + decay * weight_norm
    adjusted = torch.where(bound > 0, lr * rows.settings.eta * weight_norm / bound, 0.0)
    buffer.mul_(rows.settings.momentum)
    buffer += adjusted[:, None] * (rows.grad + decay * rows.weight)
    return buffer.clone()


_MOMENTS = ("eps", "beta1", "beta2")
_ELEMENT_MOMENTS: tuple[tuple[str, StateShape], ...] = (
    ("exp_avg", "element"),
    ("exp_avg_sq", "element"),
)
_PARTIAL_MOMENTS: tuple[tuple[str, StateShape], ...] = (
    ("exp_avg", "element"),
    ("exp_avg_sq", "row"),
)

SGD = Rule("sgd", 0, (), (), 0, _no_sums, _sgd)
ADAGRAD = Rule("adagrad", 1, (("sum", "element"),), ("eps",), 0, _no_sums, _adagrad)
ROW_WISE_ADAGRAD = Rule(
    "row_wise_adagrad", 2, (("sum", "row"),), ("eps",), 1, _squared_gradient, _row_wise_adagrad
)
ADAM = Rule("adam", 3, _ELEMENT_MOMENTS, _MOMENTS, 0, _no_sums, _adam)
PARTIAL_ROW_WISE_ADAM = Rule(
    "partial_row_wise_adam",
    4,
    _PARTIAL_MOMENTS,
    _MOMENTS,
    1,
    _squared_gradient,
    _partial_row_wise_adam,
)
LAMB = Rule("lamb", 5, _ELEMENT_MOMENTS, _MOMENTS, 2, _lamb_sums, _lamb)
PARTIAL_ROW_WISE_LAMB = Rule(
    "partial_row_wise_lamb",
    6,
    _PARTIAL_MOMENTS,
    _MOMENTS,
    3,
    _partial_row_wise_lamb_sums,
    _partial_row_wise_lamb,
    num_early_sums=1,
)

LARS_SGD = Rule(
    "lars_sgd",
    7,
    (("momentum_buffer", "element"),),
    ("momentum", "eta"),
    2,
    _norms,
    _lars_sgd,
)

RULES: tuple[Rule, ...] = (
    SGD,
    ADAGRAD,
    ROW_WISE_ADAGRAD,
    ADAM,
    PARTIAL_ROW_WISE_ADAM,
    LAMB,
    PARTIAL_ROW_WISE_LAMB,
    LARS_SGD,
)
"""All rules; the position is the code."""

_TRUST_RULES = (LAMB, PARTIAL_ROW_WISE_LAMB, LARS_SGD)


def prepare_gradient(grad: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """Clip the summed gradients [N, D] of rows, then add L2 decay."""
    grad = grad.clamp(-settings.max_gradient, settings.max_gradient)
    return grad if settings.decoupled else grad + settings.weight_decay * weight


def updated_weight(rule: Rule, rows: Rows, sums: Tensor, lr: Tensor) -> Tensor:
    """Give the new rows [N, D] in float32, and change the states in place."""
    step = rule.apply(rows, sums, lr)
    settings = rows.settings
    if settings.decoupled and rule not in _TRUST_RULES:
        return rows.weight * (1 - lr * settings.weight_decay) - step
    return rows.weight - step
