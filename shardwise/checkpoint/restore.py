"""Bringing objects into the state that was saved: first all is checked, then it is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.checkpoint.files import Files
from shardwise.checkpoint.holders import some_of
from shardwise.checkpoint.random_state import PerRank
from shardwise.checkpoint.source import check_fit, fill
from shardwise.checkpoint.state import Named, decode, encode, names_in, of_rank
from shardwise.optim import KeyedOptimizer
from shardwise.sharding.model_parallel import get_unwrapped_module
from shardwise.sharding.sliced import SlicedTensor


@dataclass
class Plan:
    """What a load will do.

    Attributes:
        files: Where from.
        rank: Of this process.
        only: Names, beginnings of names up to a dot, or patterns of tensors to load; None: all.
        is_strict: Whether every object must be there as a whole.
        into: What to read where, by name.
        then: What to do afterwards.
        values: What was saved and belongs to no object.
    """

    files: Files
    rank: int
    only: list[str] | None
    is_strict: bool
    into: list[tuple[str, Tensor]] = field(default_factory=list)
    then: list[Callable[[], Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether a tensor is to be loaded."""
        return self.only is None or any(is_named(name, one) for one in self.only)

    def run(self) -> dict[str, Any]:
        """Read all, on as many threads as torch has, and give the values.

        Checksums take most of the time: 0.15 s a GB and thread.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for _ in threads.map(lambda one: fill(self.files, *one), self.into):
                pass
        for finish in self.then:
            finish()
        return self.values

    def read(self, name: str) -> Tensor:
        """Read a tensor as a whole, into new memory."""
        saved = self.files.tensors[name]
        tensor = torch.empty(saved.shape, dtype=saved.dtype)
        fill(self.files, name, tensor)
        return tensor


def as_patterns(only: str | Sequence[str] | None) -> list[str] | None:
    """Give the patterns as a list."""
    return None if only is None else [only] if isinstance(only, str) else [*only]


def is_named(name: str, pattern: str) -> bool:
    """Whether a name is the pattern, begins with it up to a dot, or matches it."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def plan_all(plan: Plan, state: Mapping[str, Any]) -> None:
    """Plan for every object of a state; what else was saved and is no tensor becomes a value.

    Raises:
        ValueError: An object is not in the checkpoint, or is another one than was saved.
    """
    tree = plan.files.tree
    for pattern in plan.only or ():
        if not any(is_named(name, pattern) for name in plan.files.tensors):
            raise ValueError(
                f"checkpoint {plan.files.name}: only={pattern!r} is no tensor of it; it has "
                f"{some_of(plan.files.tensors)}"
            )
    if plan.is_strict and (missing := sorted(state.keys() - tree.keys())):
        raise ValueError(
            f"checkpoint {plan.files.name}: there is no {missing} in it, only {sorted(tree)}"
        )
    for name, value in state.items():
        if name in tree:
            plan_one(plan, value, name, tree[name])
    plan.values |= {
        name: decode(saved, plan.read)
        for name, saved in tree.items()
        if name not in state and not names_in(saved)
    }


def plan_one(plan: Plan, value: Any, name: str, saved: Any) -> None:
    """Plan for one value of a state."""
    if isinstance(value, PerRank):
        own = of_rank(saved, plan.rank)
        if own is not None:
            plan_one(plan, value.value, f"{name}.rank{plan.rank}", own)
    elif isinstance(value, Tensor):
        _pair(plan, {name: value}, names_in(saved), name)
    elif isinstance(value, nn.Module):
        _plan_module(plan, value, name, saved)
    elif isinstance(value, KeyedOptimizer):
        _plan_optimizer(plan, value, name, saved)
    elif hasattr(value, "load_state_dict"):
        if any(map(plan.wants, names_in(saved))) or plan.only is None:
            plan.then.append(lambda: value.load_state_dict(decode(saved, plan.read)))
    elif isinstance(value, Mapping) and any(map(_is_filled, value.values())):
        _plan_mapping(plan, value, name, saved)
    elif plan.only is None:
        plan.then.append(lambda: plan.values.update({name: decode(saved, plan.read)}))


def _is_filled(value: Any) -> bool:
    """Whether a value is brought into a state, and not given back."""
    if isinstance(value, Mapping):
        return any(map(_is_filled, value.values()))
    return isinstance(value, Tensor | PerRank) or hasattr(value, "load_state_dict")


def _plan_mapping(plan: Plan, value: Mapping[str, Any], name: str, saved: Any) -> None:
    if all(isinstance(one, Tensor) for one in value.values()):
        _pair(plan, {f"{name}.{key}": one for key, one in value.items()}, names_in(saved), name)
        return
    for key, one in value.items():
        if key in saved:
            plan_one(plan, one, f"{name}.{key}", saved[key])
        elif plan.is_strict:
            raise ValueError(f"checkpoint {plan.files.name}: there is no {name}.{key} in it")


def _pair(plan: Plan, here: Mapping[str, Tensor], saved: Iterable[str], owner: str) -> None:
    """Plan to read tensors in place; those of an object must be the same ones here and there."""
    there = {name for name in saved if plan.wants(name)}
    asked = {name: tensor for name, tensor in here.items() if plan.wants(name)}
    missing, unknown = sorted(asked.keys() - there), sorted(there - asked.keys())
    if plan.is_strict and (missing or unknown):
        raise ValueError(
            f"checkpoint {plan.files.name}: {owner!r} is of another model or optimizer: it lacks "
            f"{some_of(missing)} and has {some_of(unknown)} too many"
        )
    for name, tensor in asked.items():
        if name in there:
            check_fit(plan.files, name, tensor)
            plan.into.append((name, tensor))


def _plan_module(plan: Plan, module: nn.Module, name: str, saved: Any) -> None:
    """Read parameters and buffers in place, and let the module load what else it has saved."""
    module = get_unwrapped_module(module)
    live = _plain_tensors(module)
    here, others = {}, {}
    for key, value in module.state_dict().items():
        is_cut = isinstance(value, SlicedTensor) or hasattr(value, "device_mesh")
        if is_cut or (key in live and live[key].data_ptr() == value.data_ptr()):
            here[f"{name}.{key}"] = value
        else:
            others[key] = value
    rest = {key: one for key, one in saved.items() if key in others}
    there = set(names_in(saved)) - set(names_in(rest))
    _pair(plan, here, there, name)
    missing = sorted(others.keys() - rest.keys())
    if missing and plan.is_strict and plan.only is None:
        raise ValueError(f"checkpoint {plan.files.name}: {name!r} lacks {missing}")
    if rest and (plan.only is None or any(map(plan.wants, names_in(rest)))):
        plan.then.append(lambda: module.load_state_dict(decode(rest, plan.read), strict=False))
    plan.then += [
        partial(parameter.delta_store.mark, None)
        for parameter in module.parameters()
        if hasattr(parameter, "delta_store")  # its rows are tracked: all may have changed
    ]


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give the tensors by name of which no module says otherwise how they are loaded."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, part in module.named_modules()
        if type(part)._load_from_state_dict is nn.Module._load_from_state_dict
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }


def _plan_optimizer(plan: Plan, optimizer: KeyedOptimizer, name: str, saved: Any) -> None:
    """Read the state in place; an optimizer that has none yet makes it first."""
    here, there = Named(plan.rank), names_in(saved)
    encode(optimizer.state_dict(), here, name)
    if set(there) - here.keys():
        optimizer.init_state()
        here = Named(plan.rank)
        encode(optimizer.state_dict(), here, name)
    _pair(plan, here, there, name)
    if plan.only is None and plan.is_strict:
        plan.then.append(lambda: optimizer.load_state_dict(decode(saved, here.__getitem__)))
    else:
        plan.then.append(optimizer.post_load_state_dict)
