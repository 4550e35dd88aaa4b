"""How weight matrices start: functions by name."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

Initialization = str | Callable[[Tensor], object]
"""A function that fills a matrix [out, in] in place, or the name of one."""

_FILLS: dict[str, Callable[[Tensor], object]] = {
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
}


def find_initialization(init: Initialization) -> Callable[[Tensor], object]:
    """Give the function of an initialisation.

    Raises:
        ValueError: There is none of that name; lists those there are.
    """
    if not isinstance(init, str):
        return init
    if init not in _FILLS:
        raise ValueError(
            f"init {init!r} is unknown; known are {', '.join(_FILLS)}, or give a function"
        )
    return _FILLS[init]
