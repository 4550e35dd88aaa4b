"""Optimizers whose state is named by parameter: what a checkpoint holds, and a strict load.

How such optimizers are made from PyTorch's, joined and wrapped is in `optim.wrappers`.
"""

import abc
import copy
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from shardwise.optim.slices import owner_of


class KeyedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state dict has the names of parameters as keys.

    The state dict is `{"state": {name: {key: value}}}`, of a table in slices with its name and
    values of the whole, and with `save_param_groups(True)` also
    `"param_groups"`, where `"params"` is the sorted names. Its tensors are the optimizer's own, not
    copies, and a load copies into them. Hooks on saving and loading are not run.

    A subclass gives `step`; it may give `post_load_state_dict`.

    Args:
        params: Each parameter by name, seen live; names that are added here stay here.
        state: The state of each parameter by tensor, seen live.
        param_groups: As PyTorch's. A list is kept, not copied, so that a scheduler's changes reach
            whoever else holds it.

    Raises:
        ValueError: One tensor has two names, or a tensor of the state or of a group has none.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        state: Mapping[Any, Any],
        param_groups: Collection[Mapping[str, Any]],
    ) -> None:
        """Name the parameters of a state and of groups made elsewhere."""
        self.params: MutableMapping[str, Tensor] = ChainMap({}, cast(Any, params))
        self._saves_param_groups = False
        names = self._names()
        in_groups = [param for group in param_groups for param in group["params"]]
        _check_named(names, in_groups, "param_groups")
        _check_named(names, state, "state")
        # PyTorch's constructor sets up hooks and profiling; its own groups and state are not used.
        super().__init__([{"params": []}], {})
        self.state = cast(Any, state)
        self.param_groups = cast(
            list[dict[str, Any]],
            param_groups if isinstance(param_groups, list) else list(param_groups),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that have a name and no group yet.

        Raises:
            ValueError: A parameter has no name here, or is in a group already.
        """
        params = param_group["params"]
        tensors = [params] if isinstance(params, Tensor) else list(params)
        _check_named(self._names(), tensors, "the new group")
        super().add_param_group(param_group)

    def save_param_groups(self, save: bool) -> None:
        """Choose whether state dicts hold, and loads restore, the options of the groups."""
        self._saves_param_groups = save

    def state_dict(self) -> dict[str, Any]:
        """Give the state by parameter name; the tensors are shared with the optimizer."""
        names = self._names()
        states = {name: dict(values) for name, values in self._logical_states()}
        result: dict[str, Any] = {"state": states}
        if self._saves_param_groups:
            result["param_groups"] = [
                {"params": _group_names(names, group), **copy.deepcopy(_options(group))}
                for group in self.param_groups
            ]
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a saved state into this optimizer's, which must have the same names and shapes.

        All is checked before anything changes. Groups are left alone unless `save_param_groups`
        was asked. Tensors keep their identity, device and dtype.

        Raises:
            ValueError: Something is missing, unknown, or of another shape or kind.
        """
        states = dict(self._logical_states())
        pairs = [*self._paired_states(states, state_dict)]
        if self._saves_param_groups:
            pairs += self._paired_groups(state_dict)
        for owner, current, given in pairs:
            _check_values(owner, current, given)
        with torch.no_grad():
            for _, current, given in pairs:
                _copy_values(current, given)
            for name, values in states.items():
                self._spread(name, values)
        self.post_load_state_dict()

    def post_load_state_dict(self) -> None:
        """Bring in line what depends on the state; called at the end of each load."""

    def init_state(self, sparse_grad_parameter_names: Iterable[str] | None = None) -> None:
        """Make the state that the first step would make, so that a saved one can be loaded.

        Takes a step with gradients of zero for the parameters without state. Weights and gradients
        are put back after it, from a copy of those parameters; the state is that after one step.

        Args:
            sparse_grad_parameter_names: Parameters whose gradients are row-sparse.

        Raises:
            ValueError: A name is not one of the parameters.
        """
        sparse = set(sparse_grad_parameter_names or ())
        if unknown := sparse - self.params.keys():
            raise ValueError(
                f"init_state: no parameters named {sorted(unknown)}; there are {list(self.params)}"
            )
        stateless = {
            name: param
            for name, param in self.params.items()
            if param.requires_grad and not self.state.get(param)
        }
        if stateless:
            with self._zero_gradients(stateless, sparse):
                self.step()

    @contextmanager
    def _zero_gradients(self, params: Mapping[str, Tensor], sparse: set[str]) -> Iterator[None]:
        """Give these parameters gradients of zero and the others none; undo all at the end."""
        gradients = [(param, param.grad) for param in self.params.values()]
        weights = [(param, param.detach().clone()) for param in params.values()]
        for param, _ in gradients:
            param.grad = None
        for name, param in params.items():
            param.grad = _zero_rows(param) if name in sparse else torch.zeros_like(param)
        try:
            yield
        finally:
            with torch.no_grad():
                for param, weight in weights:
                    param.copy_(weight)
            for param, gradient in gradients:
                param.grad = gradient

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for name, param in self.params.items():
            if param in names:
                raise ValueError(
                    f"parameters {names[param]!r} and {name!r} are one tensor; give it one name"
                )
            names[param] = name
        return names

    def _logical_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the state of each parameter; of the slices of a table here, under one name."""
        names = self._names()
        for param, values in self.state.items():
            owner = owner_of(param)
            if owner is None or owner.whole is None:
                yield names[param], values
            elif not _is_further_part(param):
                logical = dict(values)
                for key in [key for key, value in values.items() if _is_local(value)]:
                    local = [self.state[part][key] for part in owner.parts if part in self.state]
                    if len(local) < len(owner.parts):
                        raise ValueError(
                            f"parameter {names[param]!r}: of its {len(owner.parts)} slices here "
                            f"{len(local)} have state; call init_state() before the first step"
                        )
                    logical[key] = owner.whole(local, values[key].shape != param.shape)
                yield names[param], logical

    def _spread(self, name: str, values: Mapping[str, Any]) -> None:
        """Give what is no value of rows to all slices of a table here."""
        owner = owner_of(self.params[name])
        for part in owner.parts if owner is not None else ():
            if part not in self.state:  # an update rule's, which has one state for all
                continue
            for key, value in values.items():
                if isinstance(value, Tensor) and not value.dim():
                    self.state[part][key].copy_(value)
                elif not isinstance(value, Tensor):
                    self.state[part][key] = value

    def _paired_states(
        self, current: Mapping[str, Any], state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any, Any]]:
        given = _entry(state_dict, "state")
        is_stateless = any(name in self.params and name not in current for name in given)
        hint = "; before the first step there is no state here: call init_state()"
        _check_same("given optimizer state", current, given, hint if is_stateless else "")
        for name, values in current.items():
            yield f"parameter {name!r}, state", values, given[name]

    def _paired_groups(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        names = self._names()
        current = {tuple(_group_names(names, group)): group for group in self.param_groups}
        given = {
            tuple(sorted(group["params"])): group for group in _entry(state_dict, "param_groups")
        }
        _check_same("given optimizer param_groups", current, given)
        for members, group in current.items():
            yield f"param group of {list(members)}, option", group, _options(given[members])


class FusedOptimizer(KeyedOptimizer, abc.ABC):
    """The view of an optimizer that lives in the operators and runs during backward.

    Its state exists from the start, under the names of the tables. `step` and `zero_grad` change no
    weight that backward has updated; they hand the learning rate of `param_groups` on.
    """

    @abc.abstractmethod
    def step(self, closure: Any = None) -> Any:
        """Hand the learning rate on."""

    @abc.abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Hand the learning rate on."""

    def init_state(self, sparse_grad_parameter_names: Iterable[str] | None = None) -> None:
        """Do nothing: the state exists from the start."""


class FusedOptimizerModule(abc.ABC):
    """A module whose tables are updated during backward."""

    @property
    @abc.abstractmethod
    def fused_optimizer(self) -> KeyedOptimizer:
        """The optimizer of those tables."""


def _zero_rows(param: Tensor) -> Tensor:
    """A row-sparse gradient that touches no row."""
    indices = torch.empty(1, 0, dtype=torch.int64, device=param.device)
    values = param.detach().new_empty(0, *param.shape[1:])
    return torch.sparse_coo_tensor(indices, values, param.shape, check_invariants=False)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _group_names(names: Mapping[Tensor, str], group: Mapping[str, Any]) -> list[str]:
    return sorted(names[param] for param in group["params"] if not _is_further_part(param))


def _is_further_part(param: Any) -> bool:
    """Whether a parameter is a slice of a table that has an earlier slice, and name, here."""
    return getattr(param, "is_further_part", False)


def _is_local(value: Any) -> bool:
    """Whether a value is of the rows of a slice, and not of the whole table already."""
    return isinstance(value, Tensor) and value.dim() > 0 and not hasattr(value, "placement")


def _check_named(names: Mapping[Tensor, str], tensors: Iterable[Any], where: str) -> None:
    for tensor in tensors:
        if _is_further_part(tensor):
            continue
        if not isinstance(tensor, Tensor) or tensor not in names:
            what = f"tensor {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{where}: {what} is none of the parameters {list(names.values())}")


def _entry(state_dict: Mapping[str, Any], key: str) -> Any:
    if key not in state_dict:
        raise ValueError(f"optimizer state dict has no {key!r}, only {sorted(state_dict)}")
    return state_dict[key]


def _check_same(what: str, current: Iterable[Any], given: Iterable[Any], hint: str = "") -> None:
    missing = sorted(set(current) - set(given))
    unknown = sorted(set(given) - set(current))
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing}, unknown {unknown}{hint}")


def _check_values(owner: str, current: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    _check_same(owner, _options(current), given)
    for key, new in given.items():
        old = current[key]
        if isinstance(old, Tensor) != isinstance(new, Tensor):
            raise ValueError(
                f"{owner} {key!r}: is of type {type(old).__name__}, got {type(new).__name__}"
            )
        if isinstance(old, Tensor) and old.shape != new.shape:
            raise ValueError(
                f"{owner} {key!r}: has shape {tuple(old.shape)}, got {tuple(new.shape)}"
            )


def _copy_values(current: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, new in given.items():
        old = current[key]
        if old is new:  # loaded in place already
            continue
        if isinstance(old, Tensor):
            old.copy_(new)
        else:
            current[key] = copy.deepcopy(new)
