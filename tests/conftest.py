"""What every test gets: fixed seeds, uninitialised memory that shows, ranks to run on."""

import ctypes
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import config as jaxtyping_config

from tests.workers import Workers

# In CI the same examples every time; elsewhere new ones, so that over the days more is covered.
settings.register_profile("shardwise", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shardwise")

M_PERTURB = -6  # glibc's malloc.h


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill fresh memory with 0xFF in tests of operators: NaN in every float dtype, -1 in integers.

    Through malloc, since torch's own switch (`fill_uninitialized_memory`) does not reach tensors
    that are made through the stable C ABI, as those of the C++ operators are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = "ops" in request.path.parts and "untouched_memory" not in request.fixturenames
    if mallopt is None or not wanted:
        yield
        return
    mallopt(M_PERTURB, 0x100)  # malloc fills with the low byte of value ^ 0xFF; 0 is "off"
    yield
    mallopt(M_PERTURB, 0)


@pytest.fixture
def untouched_memory() -> None:
    """Leave fresh memory as it comes, so that a huge `torch.empty` takes address space only."""


def shardwise_classes() -> set[type]:
    modules = [module for name, module in sys.modules.items() if name.startswith("shardwise.")]
    values = [value for module in modules for value in vars(module).values()]
    return {v for v in values if isinstance(v, type) and v.__module__.startswith("shardwise.")}


@pytest.fixture
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn jaxtyping's checks off, which `torch.compile` and `torch.export` cannot trace."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    # Off is not enough for methods of an object made in a traced region: there dynamo reads all
    # that the wrapper holds.
    for cls in shardwise_classes():
        for name, method in list(vars(cls).items()):
            function = method.__func__ if isinstance(method, staticmethod) else method
            if getattr(function, "__globals__", {}).get("__name__") == "jaxtyping._decorator":
                bare = inspect.unwrap(function)
                is_static = isinstance(method, staticmethod)
                monkeypatch.setattr(cls, name, staticmethod(bare) if is_static else bare)
    yield
    jaxtyping_config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(world_size, function, *args)`: the results of the function on each rank.

    The function, at the top level of its module, is called as `function(rank, world_size, *args)`
    with `torch.distributed` (gloo) set up for that many ranks. All tests share one pool.
    """
    workers = Workers()
    yield workers.run
    workers.close()
