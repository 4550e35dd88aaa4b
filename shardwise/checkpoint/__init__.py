"""Checkpoints: the state of a model and all else that trains, saved and loaded in any layout."""

from shardwise.checkpoint.folder import (
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    read_state,
    read_tensors,
    save_checkpoint,
)

__all__ = [
    "find_checkpoint",
    "list_checkpoints",
    "load_tensors",
    "read_state",
    "read_tensors",
    "save_checkpoint",
]
