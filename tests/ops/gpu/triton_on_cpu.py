"""A pytest plugin: the operators of CPU tensors run their Triton versions.

Under `TRITON_INTERPRET=1` these run as they are. Otherwise every tensor goes to the CUDA device and
comes back, what was changed in place too. So the operators' own tests serve for both. `EVERY=3`
runs every third test.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ["SHARDWISE_OPS"] = "reference"  # the compiled operators would hold the CPU's place

# What stays on the host: features and bags, slots, and results' counts.
HOST = {"features", "bags", "slots"}
# Refused on the CPU, noted on a device.
LATER = ("bad_id_names", "either_end_is_refused", "in_backward_changes_no_row", "bad_layout")


def move(value: Any, name: str, made: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, list):
        return [move(one, name, made) for one in value]
    if not isinstance(value, torch.Tensor) or name in HOST:
        return value
    moved = value.detach().cuda()
    made[id(moved)] = (value, moved)
    return moved


def on_device(name: str) -> Callable[..., Any]:
    names = [
        argument.name for argument in getattr(torch.ops.shardwise, name).default._schema.arguments
    ]

    def run(*arguments: Any) -> Any:
        made: dict[int, tuple[Any, Any]] = {}
        moved = [move(value, key, made) for key, value in zip(names, arguments, strict=True)]
        results = getattr(torch.ops.shardwise, name)(*moved)
        for value, copy in made.values():
            value.detach().copy_(copy)
        if isinstance(results, tuple):
            return tuple(result.cpu() for result in results)
        return None if results is None else results.cpu()

    return run


def pytest_configure() -> None:
    library = importlib.import_module("shardwise.ops.library")  # after the hook for shape checks
    importlib.import_module("shardwise")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if is_interpreted:  # a program costs milliseconds whatever its size
        importlib.import_module("shardwise.ops.lookup.gpu_layout").TILE = 1 << 15
    for name, module in library.GPU_VERSIONS.items():
        version = (
            getattr(importlib.import_module(module), name) if is_interpreted else on_device(name)
        )
        torch.library.impl(f"shardwise::{name}", "CPU")(version)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not any(word in item.name for word in LATER)]
    items[:] = items[:: int(os.environ.get("EVERY", "1"))]
