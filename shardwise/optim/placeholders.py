"""Names of update rules: classes to give to `in_backward` and `apply_optimizer_in_backward`.

The signatures say which options each rule takes, and its defaults. The formulas are those of
`ops.lookup.rules`. These optimizers do not step themselves: a rule needs to know which rows were
touched, so it is the tables that run it.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.optim.optimizer import ParamsT


def refuse_step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> NoReturn:
    """Say who runs the rule; the `step` of all classes here.

    Raises:
        RuntimeError: Always. Tables that run the rule need no step of this optimizer, and any other
            parameter would silently not be trained.
    """
    name = type(self).__name__
    shapes = [tuple(param.shape) for group in self.param_groups for param in group["params"]]
    raise RuntimeError(
        f"shardwise.optim.{name} names an update rule and cannot step parameters of shapes "
        f"{shapes}; let the tables run it with in_backward(model, {name}, lr=...), and give other "
        "parameters an optimizer of torch.optim"
    )


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent."""

    step = refuse_step

    def __init__(self, params: ParamsT, lr: float = 0.01, weight_decay: float = 0.0) -> None:
        """Name the rule."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})


class Adagrad(torch.optim.Optimizer):
    """Adagrad with a sum per element.

    J. Duchi, E. Hazan, Y. Singer, "Adaptive subgradient methods", JMLR 12, 2011.
    """

    step = refuse_step

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        """Name the rule."""
        start = initial_accumulator_value
        options = {"weight_decay": weight_decay, "initial_accumulator_value": start, "eps": eps}
        super().__init__(params, {"lr": lr, **options})


class LarsSGD(torch.optim.Optimizer):
    """SGD with momentum whose rate follows norm of row over norm of gradient, row by row.

    Y. You, I. Gitman, B. Ginsburg, "Large batch training of convolutional networks", 2017.
    """

    step = refuse_step

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        """Name the rule."""
        options = {"momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, {"lr": lr, **options})


class _MomentRule(torch.optim.Optimizer):
    step = refuse_step

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Name the rule."""
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **options})


class Adam(_MomentRule):
    """Adam with decoupled weight decay.

    D. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """


class PartialRowWiseAdam(_MomentRule):
    """Adam whose second moment is a number per row: the mean squared gradient."""


class LAMB(_MomentRule):
    """Adam whose step is scaled by norm of row over norm of step, row by row.

    Y. You et al., "Large batch optimization for deep learning", ICLR 2020.
    """


class PartialRowWiseLAMB(_MomentRule):
    """LAMB whose second moment is a number per row."""
