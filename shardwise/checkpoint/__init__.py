"""Checkpoints: the state of a model and all else that trains, saved and loaded in any layout.

A checkpoint knows tables, not where they lay: whatever plan, world size and dtype loads what any
other has saved. `Checkpoints` saves and loads; `source` reads tensors from files into a layout.
"""

from shardwise.checkpoint.checkpoints import (
    Checkpoints,
    PendingSave,
    load_checkpoint,
    read_checkpoint,
    read_values,
    save_checkpoint,
)
from shardwise.checkpoint.folder import find_checkpoint, list_checkpoints
from shardwise.checkpoint.random_state import PerRank, RandomState

__all__ = [
    "Checkpoints",
    "PendingSave",
    "PerRank",
    "RandomState",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "read_checkpoint",
    "read_values",
    "save_checkpoint",
]
