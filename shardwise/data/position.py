"""What a saved position counts in, so that it is not taken for one in other samples."""

from collections.abc import Mapping
from typing import Any


def check_units(owner: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a position was saved where another order of samples holds.

    Args:
        owner: Whose position it is, for the message.
        saved: The position, with what it counts in.
        here: What a position counts in now.
    """
    for name, value in here.items():
        if saved[name] != value:
            raise ValueError(
                f"{owner}: the position was saved with {name} {saved[name]}, this loader has "
                f"{value}; what comes next would not be the same"
            )
