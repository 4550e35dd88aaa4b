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
from shardwise.checkpoint.rows import load_rows
from shardwise.checkpoint.safetensors import export_safetensors, load_safetensors
from shardwise.checkpoint.torchrec import load_torchrec_checkpoint

__all__ = [
    "Checkpoints",
    "PendingSave",
    "PerRank",
    "RandomState",
    "export_safetensors",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_rows",
    "load_safetensors",
    "load_torchrec_checkpoint",
    "read_checkpoint",
    "read_values",
    "save_checkpoint",
]
