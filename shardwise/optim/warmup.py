"""Learning rate schedules in stages, kept with the optimizer's state."""

import enum
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.optim.keyed import KeyedOptimizer
from shardwise.optim.wrappers import MergedState, OptimizerWrapper


class WarmupPolicy(enum.Enum):
    """How the multiplier of a stage follows from the step number."""

    NONE = "none"
    LINEAR = "linear"
    CONSTANT = "constant"
    POLY = "poly"
    STEP = "step"
    INVSQRT = "inv_sqrt"
    COSINE_ANNEALING_WARM_RESTARTS = "cosine_annealing_warm_restarts"


@dataclass(frozen=True)
class WarmupStage:
    """A stretch of steps with one schedule.

    With i the number of steps taken since the start of training, the multiplier is

        NONE      1
        LINEAR    value + (1 - value) * i / max_iters
        CONSTANT  value
        POLY      (1 - i / decay_iters) ** value, 0 from decay_iters on
        STEP      value ** (i // decay_iters)
        INVSQRT   1 / sqrt(i), 1 at i = 0
        COSINE_ANNEALING_WARM_RESTARTS
                  value + (1 - value) * (1 + cos(pi * (i % sgdr_period) / sgdr_period)) / 2

    Attributes:
        policy: Which of them.
        max_iters: The step at which the stage ends, counted from the start of training.
        value: As above.
        lr_scale: Multiplies the result.
        decay_iters: As above, in steps; -1 stands for 1 with STEP and for `max_iters` otherwise.
        sgdr_period: Steps between restarts.
    """

    policy: WarmupPolicy = WarmupPolicy.LINEAR
    max_iters: int = 1
    value: float = 1.0
    lr_scale: float = 1.0
    decay_iters: int = -1
    sgdr_period: int = 1

    def __post_init__(self) -> None:
        """Refuse counts of steps that are not positive."""
        for name in ("max_iters", "sgdr_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"WarmupStage: {name} must be above 0, got {getattr(self, name)}")
        if self.decay_iters < 1 and self.decay_iters != -1:
            raise ValueError(
                f"WarmupStage: decay_iters must be above 0, or -1, got {self.decay_iters}"
            )

    def multiplier(self, iteration: int) -> float:
        """Give what the learning rate is multiplied with after `iteration` steps of training."""
        return self.lr_scale * _FORMULAS[self.policy](self, iteration)


def _decay_iters(stage: WarmupStage) -> int:
    if stage.decay_iters != -1:
        return stage.decay_iters
    return 1 if stage.policy is WarmupPolicy.STEP else stage.max_iters


def _linear(stage: WarmupStage, iteration: int) -> float:
    return stage.value + (1 - stage.value) * iteration / stage.max_iters


def _poly(stage: WarmupStage, iteration: int) -> float:
    return float(max(1 - iteration / _decay_iters(stage), 0.0) ** stage.value)


def _step(stage: WarmupStage, iteration: int) -> float:
    return float(stage.value ** (iteration // _decay_iters(stage)))


def _cosine(stage: WarmupStage, iteration: int) -> float:
    turn = (iteration % stage.sgdr_period) / stage.sgdr_period
    return stage.value + (1 - stage.value) * 0.5 * (1 + math.cos(math.pi * turn))


_FORMULAS: dict[WarmupPolicy, Callable[[WarmupStage, int], float]] = {
    WarmupPolicy.NONE: lambda stage, iteration: 1.0,
    WarmupPolicy.LINEAR: _linear,
    WarmupPolicy.CONSTANT: lambda stage, iteration: stage.value,
    WarmupPolicy.POLY: _poly,
    WarmupPolicy.STEP: _step,
    WarmupPolicy.INVSQRT: lambda stage, iteration: 1 / math.sqrt(max(iteration, 1)),
    WarmupPolicy.COSINE_ANNEALING_WARM_RESTARTS: _cosine,
}


class WarmupOptimizer(OptimizerWrapper):
    """Set the learning rate of all groups by stages of steps.

    The number of steps taken is saved in the state dict as parameter `param_name`, state
    `iteration`, so that a resumed run goes on where it was. After the last stage the multiplier is
    1. The rate is set when this is made, after each step and after a load; an optimizer that runs
    in backward takes it over at its next `zero_grad` or `step`.

    Args:
        optimizer: Takes the steps.
        stages: In order; each begins where the one before ends.
        lr: The learning rate where the multiplier is 1.
        lr_param: The option of the groups to set.
        param_name: The name under which the number of steps is saved.

    Raises:
        ValueError: Stages do not end later and later, a group has no such option, or the name is
            taken.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        stages: Sequence[WarmupStage],
        lr: float = 0.1,
        lr_param: str = "lr",
        param_name: str = "__warmup",
    ) -> None:
        """Set the learning rate of the first step."""
        super().__init__(optimizer)
        _check_stages(stages)
        if param_name in self.params:
            raise ValueError(f"WarmupOptimizer: there is a parameter {param_name!r} already")
        for number, group in enumerate(self.param_groups):
            if lr_param not in group:
                raise ValueError(f"WarmupOptimizer: group {number} has no {lr_param!r}: {[*group]}")
        self._stages = tuple(stages)
        self._lr = lr
        self._lr_param = lr_param
        self._iteration = torch.zeros((), dtype=torch.int64)
        # State is keyed by tensor, so the count gets one of no elements.
        key = self.params[param_name] = torch.empty(0)
        own_state = {key: {"iteration": self._iteration}}
        self.state: Any = MergedState([optimizer.state, own_state])
        self._set_lr()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, then set the learning rate of the next."""
        loss = self._optimizer.step(closure)
        self._iteration += 1
        self._set_lr()
        return loss

    def post_load_state_dict(self) -> None:
        """Set the learning rate for the loaded number of steps."""
        self._set_lr()
        super().post_load_state_dict()

    def _set_lr(self) -> None:
        iteration = int(self._iteration)
        stage = next((stage for stage in self._stages if iteration < stage.max_iters), None)
        lr = self._lr * (1.0 if stage is None else stage.multiplier(iteration))
        for group in self.param_groups:
            if isinstance(group[self._lr_param], torch.Tensor):
                group[self._lr_param].fill_(lr)
            else:
                group[self._lr_param] = lr


def _check_stages(stages: Sequence[WarmupStage]) -> None:
    ends = [stage.max_iters for stage in stages]
    for number, (earlier, later) in enumerate(itertools.pairwise(ends), start=1):
        if later <= earlier:
            raise ValueError(
                f"WarmupOptimizer: stage {number} ends at step {later}, not after stage "
                f"{number - 1}, which ends at {earlier}; max_iters counts from the start"
            )
