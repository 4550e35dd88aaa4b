"""Checkpoints of a run: one folder per step, complete or absent, and no code in it.

`step_<n>` is written by torch's distributed checkpoint under another name and renamed when whole.
It holds tensors by name, and `state.json` with all that is no tensor and the size of every file, so
that a cut-off file is found before anything is loaded. Distributed checkpoint describes its tensors
in a pickle; it is read here with no more than the classes such a description is made of.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_STATE = "state.json"
_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `folder/step_<step>` and remove the oldest ones beyond `keep`.

    Args:
        folder: Where the checkpoints of the run lie; made if absent.
        step: Steps taken so far.
        tensors: What to save, by name.
        state: What is no tensor; JSON must be able to hold it.
        keep: How many checkpoints to leave, this one among them.

    Returns:
        The folder written.
    """
    path = folder / f"step_{step}"
    unfinished = folder / f".step_{step}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with _one_process():
        save(dict(tensors), storage_writer=FileSystemWriter(unfinished, overwrite=True))
    sizes = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
    text = json.dumps({"step": step, "files": sizes, "state": state}, indent=1)
    (unfinished / _STATE).write_text(text, encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def find_checkpoint(folder: Path) -> Path:
    """Give the folder itself if it is one checkpoint, else the latest of those in it.

    Raises:
        FileNotFoundError: There is none.
    """
    if (folder / _STATE).is_file():
        return folder
    found = list_checkpoints(folder)
    if not found:
        what = "no step_<n> in this folder" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"checkpoint {folder}: {what}; name one that training wrote")
    return found[-1]


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, the latest last; none where there is no such folder."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_state(path: Path) -> dict[str, Any]:
    """Read what is no tensor, after checking that the files are whole.

    Args:
        path: One checkpoint.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is cut off or damaged.
    """
    try:
        saved = json.loads((path / _STATE).read_text(encoding="utf-8"))
        files, state = saved["files"], saved["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {_STATE} is cut off or damaged ({error})") from error
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise FileNotFoundError(f"checkpoint {path}: file {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(
                f"checkpoint {path}: file {name} has {file.stat().st_size} bytes, {size} were "
                "written; take another checkpoint"
            )
    return dict(state)


def load_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into these; nothing is changed unless all of them can be.

    Args:
        path: One checkpoint, whose files `read_state` has found whole.
        into: By name. The checkpoint may hold others, which are not read.

    Raises:
        ValueError: A tensor is not in the checkpoint or of another shape or dtype there, or its
            data is damaged.
    """
    reader = _Reader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"checkpoint {path}: file .metadata is damaged ({error})") from error
    for name, tensor in into.items():
        _check_same(path, name, tensor, saved.get(name))
    loaded = {name: torch.empty_like(tensor) for name, tensor in into.items()}
    try:
        with _one_process():
            load(loaded, storage_reader=reader)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {path}: the data of its tensors is damaged") from error
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(loaded[name])


def _check_same(path: Path, name: str, tensor: Tensor, saved: Any) -> None:
    here = f"{list(tensor.shape)} {tensor.dtype}"
    if not isinstance(saved, TensorStorageMetadata):
        raise ValueError(
            f"checkpoint {path}: there is no tensor {name!r} ({here} here); it was saved from "
            "another model or optimizer"
        )
    if saved.size != tensor.shape or saved.properties.dtype != tensor.dtype:
        there = f"{list(saved.size)} {saved.properties.dtype}"
        raise ValueError(
            f"checkpoint {path}: tensor {name!r} is {there} there and {here} here; use the config "
            "and the data it was saved with"
        )


@contextmanager
def _one_process() -> Iterator[None]:
    """Let one process be enough, without a warning that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(FileSystemReader):
    """Reads the description of the tensors without running what else a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _DescriptionUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _DescriptionUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "_StorageInfo",
        }
    )
    _OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_described = module in self._MODULES and name in self._NAMES
        if is_dtype or is_described or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description needs")
