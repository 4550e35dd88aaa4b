"""Errors that one rank has and all raise: as text between ranks, and back as an error."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Fault: TypeAlias = dict[str, str]
"""An error as it travels: the name of its class and its text."""

# Raised again on other ranks under their own class; what is not one of these is a RuntimeError.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (IndexError, KeyError, ValueError, TypeError, RuntimeError, MemoryError, OSError)
}


def describe(error: BaseException | None) -> Fault | None:
    """Write an error down; None where there is none, or where it came from another rank."""
    if error is None or is_shared(error):
        return None
    is_key = isinstance(error, KeyError) and error.args
    text = str(error.args[0]) if is_key else str(error) or "without a word"
    kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    name = type(error).__name__
    kind = next(kinds, "RuntimeError")
    return {"kind": kind, "text": text if kind == name else f"{name}: {text}"}


def restore(faults: Mapping[int, Fault]) -> Exception:
    """Make the error that all ranks raise: the lowest rank's, with the others' as notes.

    Args:
        faults: By rank; at least one.
    """
    (rank, first), *others = sorted(faults.items())
    error = share(_KINDS[first["kind"]](f"rank {rank}: {first['text']}"))
    for other, fault in others:
        error.add_note(f"and rank {other}: {fault['text']}")
    return error


def share(error: Exception) -> Exception:
    """Mark an error as one that the other ranks raise too, or know of."""
    error.__dict__["is_on_all_ranks"] = True
    return error


def is_shared(error: BaseException) -> bool:
    """Tell whether the other ranks raise this error too, or know of it."""
    return "is_on_all_ranks" in error.__dict__


def some(parts: Iterable[str], limit: int = 8) -> str:
    """Join the first of many parts of a message."""
    shown: list[Any] = list(parts)
    more = f"; and {len(shown) - limit} more" if len(shown) > limit else ""
    return "; ".join(shown[:limit]) + more
