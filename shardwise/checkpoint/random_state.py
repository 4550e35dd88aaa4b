"""What is each rank's own, generators of random numbers above all."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerRank:
    """Says in a state that a value is each rank's own; a rank that was not there keeps its own.

    Attributes:
        value: Anything that a state may hold.
    """

    value: Any


class RandomState:
    """The state of the generators of this process: Python's, torch's, and NumPy's where it is used.

    Each rank has its own, so in a checkpoint it is `PerRank(RandomState())`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Take the states."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        }
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        if numpy := sys.modules.get("numpy"):
            _, keys, *others = numpy.random.get_state()
            state["numpy"] = {"keys": torch.tensor(keys.tolist()), "others": others}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the states."""
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        torch.set_rng_state(_own(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_own(state["cuda"]))
        numpy = sys.modules.get("numpy")
        if numpy and "numpy" in state:
            keys, others = state["numpy"]["keys"], state["numpy"]["others"]
            keys = numpy.array(keys.tolist(), dtype=numpy.uint32)
            numpy.random.set_state(("MT19937", keys, *others))


def _own(state: Tensor) -> Tensor:
    return state.cpu().clone()  # a view makes torch 2.13 crash
