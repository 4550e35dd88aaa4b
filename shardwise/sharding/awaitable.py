"""Results that are on their way: waited for when asked, or at the first use."""

import abc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch.utils._pytree import tree_map

T = TypeVar("T")


class Awaitable(abc.ABC, Generic[T]):
    """A value that a rank may have to wait for."""

    @abc.abstractmethod
    def wait(self) -> T:
        """Give the value; the second time at once."""


class NoWait(Awaitable[T]):
    """A value that is there.

    Args:
        value: The value.
    """

    def __init__(self, value: T) -> None:
        """Keep the value."""
        self._value = value

    def wait(self) -> T:
        """Give the value."""
        return self._value


class Deferred(Awaitable[T]):
    """A value that takes a wait to get.

    Args:
        wait: Waits for the value and gives it; called once.
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        """Remember how to wait."""
        self._wait: Callable[[], T] | None = wait
        self._value: Any = None

    def wait(self) -> T:
        """Give the value."""
        if self._wait is not None:
            self._value = self._wait()
            self._wait = None  # lets go of what the wait needed
        value: T = self._value
        return value


class LazyAwaitable(Deferred[T]):
    """A value that is waited for at its first use, as if it were there already.

    Attributes, items, arithmetic and PyTorch's functions reach the value, and `isinstance` takes it
    for one of its type, too; `wait` gives the value itself.

    Args:
        wait: Waits for the value and gives it; called once.
        result_type: The type of the value.
    """

    def __init__(self, wait: Callable[[], T], result_type: type[T]) -> None:
        """Remember how to wait."""
        super().__init__(wait)
        self._type = result_type

    @property  # type: ignore[misc]  # that of `object` can be set
    def __class__(self) -> Any:
        """The type of the value, which is known without waiting."""
        return self._type

    def __getattr__(self, name: str) -> Any:
        """Give an attribute of the value."""
        if name in ("_wait", "_value", "_type"):  # not made yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.wait(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch's on the value."""
        args, kwargs = tree_map(_waited, (args, kwargs or {}))
        return func(*args, **kwargs)


def _waited(value: Any) -> Any:
    return value.wait() if issubclass(type(value), LazyAwaitable) else value


def _reach(name: str) -> Callable[..., Any]:
    def method(self: LazyAwaitable[Any], *args: Any) -> Any:
        return getattr(self.wait(), name)(*map(_waited, args))

    return method


# Python looks these up on the class, so `__getattr__` does not see them.
for _name in (
    *("__len__", "__iter__", "__contains__", "__getitem__", "__setitem__", "__bool__", "__float__"),
    *("__int__", "__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"),
    *(f"__{r}{op}__" for r in ("", "r") for op in ("add", "sub", "mul", "truediv", "pow")),
    *("__matmul__", "__rmatmul__", "__floordiv__", "__mod__"),
):
    setattr(LazyAwaitable, _name, _reach(_name))

__all__ = ["Awaitable", "LazyAwaitable", "NoWait"]
