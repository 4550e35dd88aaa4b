"""Load the compiled operators, or define their schemas for the reference versions alone.

An operator has one schema (a line of `schemas.inc`, which C++ includes too), a plain PyTorch
reference and a fake version for tracing. The compiled CPU version, when there, is registered by
the library itself as it loads. Triton versions are loaded when the first CUDA tensor comes. The
reference serves every device that has no version of its own.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_INSTALLED = Path(__file__).parent.parent / "_lib" / "libshardwise.so"
_LIBRARY = Path(os.environ.get("SHARDWISE_LIBRARY", _INSTALLED))  # another one for `make sanitize`
_SCHEMAS = Path(__file__).with_name("schemas.inc")

GPU_VERSIONS = dict.fromkeys(
    ("lookup", "count_bad_ids", "update_", "row_sums", "row_grads", "weight_grads"),
    "shardwise.ops.lookup.gpu",
) | dict.fromkeys(("interaction", "interaction_grad"), "shardwise.ops.interaction.gpu")
"""Operators with a Triton version, and the module whose function of that name it is."""


def _load() -> bool:
    """Load the compiled operators; False, with every schema defined here, where there are none."""
    if os.environ.get("SHARDWISE_OPS") != "reference":
        if _LIBRARY.exists():
            torch.ops.load_library(str(_LIBRARY))
            return True
        warnings.warn(
            "shardwise was installed without its compiled operators (no C++ compiler was found): "
            "every operator runs its slower PyTorch reference; install g++ and reinstall",
            stacklevel=2,
        )
    for schema in _SCHEMAS.read_text().splitlines()[1:-1]:
        name, _, signature = schema.partition("(")
        torch.library.define(f"shardwise::{name}", f"({signature}")
    return False


is_compiled: bool = _load()
"""Whether the compiled CPU operators are in use."""


def _load_for_gpu(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that becomes the Triton version of an operator at its first call."""
    found: list[Callable[..., Any]] = []

    def run(*arguments: Any) -> Any:
        if not found:
            try:
                found.append(getattr(importlib.import_module(GPU_VERSIONS[name]), name))
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                warnings.warn(
                    f"Triton is not installed: on CUDA, {name} runs its slower PyTorch reference; "
                    f"install the triton that your torch names",
                    stacklevel=2,
                )
                found.append(reference)
        return found[0](*arguments)

    return run


def register(
    name: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register the reference and the fake version of an operator of `schemas.inc`.

    Args:
        name: The operator's name, without namespace.
        reference: Plain PyTorch on tensors of any device; takes the schema's arguments in order.
        fake: As `reference`, on tensors without data: only shapes and dtypes.

    Returns:
        The operator, to be called with positional arguments.
    """
    qualified = f"shardwise::{name}"
    torch.library.impl(qualified, "CompositeExplicitAutograd")(reference)
    if name in GPU_VERSIONS:
        torch.library.impl(qualified, "CUDA")(_load_for_gpu(name, reference))
    torch.library.register_fake(qualified)(fake)
    operator: Callable[..., Any] = getattr(torch.ops.shardwise, name).default
    return operator
