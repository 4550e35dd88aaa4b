"""Keyed optimizers made from others: named, wrapped, joined.

All of them look at the state and groups of what they wrap instead of copying, so the outermost one
saves and loads everything, and schedulers may hold any of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.optim.keyed import KeyedOptimizer

Closure = Callable[[], Any]


class KeyedOptimizerWrapper(KeyedOptimizer):
    """Name the parameters of an optimizer of PyTorch's.

    Args:
        params: Each parameter by name.
        optim_factory: Makes the optimizer from the list of parameters.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        optim_factory: Callable[[list[Tensor]], torch.optim.Optimizer],
    ) -> None:
        """Make the optimizer."""
        self._optimizer = optim_factory(list(params.values()))
        super().__init__(dict(params), self._optimizer.state, self._optimizer.param_groups)
        self.defaults = self._optimizer.defaults

    def step(self, closure: Closure | None = None) -> Any:
        """Take the step of the optimizer."""
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or with `set_to_none=False` make them zero."""
        self._optimizer.zero_grad(set_to_none)


class OptimizerWrapper(KeyedOptimizer):
    """A keyed optimizer that does what another does, for subclasses that change a part of it.

    Args:
        optimizer: The other; its choice of `save_param_groups` is taken over.

    Raises:
        TypeError: It is not a keyed optimizer.
    """

    def __init__(self, optimizer: KeyedOptimizer) -> None:
        """Wrap an optimizer."""
        self._optimizer = _checked(optimizer, type(self).__name__)
        super().__init__(optimizer.params, optimizer.state, optimizer.param_groups)
        self.defaults = optimizer.defaults
        self._saves_param_groups = optimizer._saves_param_groups

    def step(self, closure: Closure | None = None) -> Any:
        """Take the step of the wrapped optimizer."""
        return self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or with `set_to_none=False` make them zero."""
        self._optimizer.zero_grad(set_to_none)

    def post_load_state_dict(self) -> None:
        """Tell the wrapped optimizer that its state was loaded."""
        self._optimizer.post_load_state_dict()

    def init_state(self, sparse_grad_parameter_names: Iterable[str] | None = None) -> None:
        """Make the state of the wrapped optimizer; see `KeyedOptimizer.init_state`."""
        self._optimizer.init_state(sparse_grad_parameter_names)


class CombinedOptimizer(KeyedOptimizer):
    """Several keyed optimizers as one.

    Its groups are those of all parts, in order, so one scheduler drives them all.

    Args:
        optims: The parts. One given as (prefix, optimizer) has its names become `prefix.name`.

    Raises:
        TypeError: A part is not a keyed optimizer.
        ValueError: Two parts give the same name, or hold the same tensor.
    """

    def __init__(self, optims: Sequence[KeyedOptimizer | tuple[str, KeyedOptimizer]]) -> None:
        """Join optimizers."""
        pairs = [part if isinstance(part, tuple) else ("", part) for part in optims]
        self._optims = [(prefix, _checked(part, "CombinedOptimizer")) for prefix, part in pairs]
        names = [_join(prefix, name) for prefix, part in self._optims for name in part.params]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"CombinedOptimizer: two optimizers have a parameter {repeated[0]!r}; "
                "give one of them a prefix: (prefix, optimizer)"
            )
        parts = [part for _, part in self._optims]
        groups = [group for part in parts for group in part.param_groups]
        state = MergedState([part.state for part in parts])
        super().__init__(MergedParams(self._optims), state, groups)
        self._saves_param_groups = any(part._saves_param_groups for part in parts)

    @property
    def optimizers(self) -> list[tuple[str, KeyedOptimizer]]:
        """The parts as (prefix, optimizer), the prefix empty where none was given."""
        return self._optims

    def step(self, closure: Closure | None = None) -> Any:
        """Take the step of each part, after one call of `closure`; give what that returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, part in self._optims:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of each part."""
        for _, part in self._optims:
            part.zero_grad(set_to_none)

    def save_param_groups(self, save: bool) -> None:
        """Choose for this optimizer and its parts."""
        super().save_param_groups(save)
        for _, part in self._optims:
            part.save_param_groups(save)

    def post_load_state_dict(self) -> None:
        """Tell each part that its state was loaded."""
        for _, part in self._optims:
            part.post_load_state_dict()

    def init_state(self, sparse_grad_parameter_names: Iterable[str] | None = None) -> None:
        """Make the state of each part; see `KeyedOptimizer.init_state`.

        Args:
            sparse_grad_parameter_names: Full names, with the prefix.

        Raises:
            ValueError: A name is not one of the parameters.
        """
        sparse = set(sparse_grad_parameter_names or ())
        if unknown := sparse - self.params.keys():
            raise ValueError(
                f"init_state: no parameters named {sorted(unknown)}; there are {list(self.params)}"
            )
        for prefix, part in self._optims:
            part.init_state([name for name in part.params if _join(prefix, name) in sparse])


class MergedState(Mapping[Tensor, Any]):
    """The states of several optimizers as one, seen live.

    Not a `ChainMap`: looking a tensor up in the state of an optimizer that does not own it would
    leave an empty entry there.
    """

    def __init__(self, states: Sequence[Mapping[Tensor, Any]]) -> None:
        """Look at states, each of other tensors."""
        self._states = states

    def __getitem__(self, param: Tensor) -> Any:
        """Give the state of a parameter."""
        for state in self._states:
            if param in state:
                return state[param]
        raise KeyError(param)

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the parameters that have a state."""
        for state in self._states:
            yield from state

    def __len__(self) -> int:
        """Count the parameters that have a state."""
        return sum(len(state) for state in self._states)


class MergedParams(Mapping[str, Tensor]):
    """The parameters of several optimizers as one, seen live.

    Args:
        optims: (prefix, optimizer).
    """

    def __init__(self, optims: Sequence[tuple[str, KeyedOptimizer]]) -> None:
        """Look at parameters, each of another full name."""
        self._optims = optims

    def __getitem__(self, full_name: str) -> Tensor:
        """Give the parameter of a name."""
        for prefix, part in self._optims:
            name = full_name.removeprefix(_join(prefix, ""))
            if _join(prefix, name) == full_name and name in part.params:
                return part.params[name]
        raise KeyError(full_name)

    def __iter__(self) -> Iterator[str]:
        """Go through the full names."""
        for prefix, part in self._optims:
            for name in part.params:
                yield _join(prefix, name)

    def __len__(self) -> int:
        """Count the parameters."""
        return sum(len(part.params) for _, part in self._optims)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _checked(optimizer: Any, owner: str) -> KeyedOptimizer:
    if not isinstance(optimizer, KeyedOptimizer):
        raise TypeError(
            f"{owner} takes keyed optimizers, got {type(optimizer).__name__}; "
            "make one with KeyedOptimizerWrapper(dict(named_parameters), optim_factory)"
        )
    return optimizer
