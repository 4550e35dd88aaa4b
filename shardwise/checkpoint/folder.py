"""Checkpoints of a run: one folder per step, complete or absent, and no code in it.

`step_<n>` is written by torch's distributed checkpoint under another name and renamed when whole.
It holds tensors by name, and `state.json` with all that is no tensor and the size of every file, so
that a cut-off file is found before anything is loaded. Several ranks write their own parts, and any
number of them reads a checkpoint. Distributed checkpoint describes its tensors in a pickle; it is
read here with no more than the classes such a description is made of.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from shardwise.sharding.wire import Wire

_STATE = "state.json"
_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    wire: Wire | None = None,
) -> Path:
    """Write `folder/step_<step>` and remove the oldest ones beyond `keep`.

    Args:
        folder: Where the checkpoints of the run lie; made if absent.
        step: Steps taken so far.
        tensors: What to save, by name.
        state: What is no tensor; JSON must be able to hold it.
        keep: How many checkpoints to leave, this one among them.
        wire: Connects who saves: each calls this with the same arguments, but with its own parts of
            tensors, in a folder that all of them see; None: this process alone.

    Returns:
        The folder written.
    """
    is_first = wire is None or wire.rank == 0
    path = folder / f"step_{step}"
    unfinished = folder / f".step_{step}.unfinished"
    with _together(wire, "preparing a checkpoint"):
        if is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    writer = FileSystemWriter(unfinished, overwrite=True)
    with _one_process():
        save(dict(tensors), storage_writer=writer, no_dist=wire is None)
    with _together(wire, "finishing a checkpoint"):
        if is_first:
            _finish(unfinished, path, {"step": step, "state": state}, keep)
    return path


def _together(wire: Wire | None, what: str) -> AbstractContextManager[None]:
    return nullcontext() if wire is None else wire.together(what)


def _finish(unfinished: Path, path: Path, content: Mapping[str, Any], keep: int) -> None:
    """Add the state to a folder that holds all tensors, give it its name, remove old ones."""
    sizes = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
    text = json.dumps({"files": sizes, **content}, indent=1)
    (unfinished / _STATE).write_text(text, encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    for old in list_checkpoints(path.parent)[:-keep]:
        shutil.rmtree(old)


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


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors whose names begin with a prefix into new memory.

    Args:
        path: One checkpoint, whose files `read_state` has found whole.
        prefix: What to read; by default everything.

    Raises:
        ValueError: The data is damaged.
    """
    tensors = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in _describe(path).items()
        if name.startswith(prefix)
    }
    _load(path, tensors)
    return tensors


def load_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Read into these tensors, of which a rank may hold parts; it reads no more than they hold.

    Args:
        path: One checkpoint, whose files `read_state` has found whole.
        into: Tensors by name: all that the checkpoint has under the first words of their names.

    Raises:
        ValueError: The names differ, or a shape or a dtype, and nothing has been read; or the data
            is damaged.
    """
    kinds = {name.partition(".")[0] for name in into}
    saved = {n: one for n, one in _describe(path).items() if n.partition(".")[0] in kinds}
    missing, unknown = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unknown:
        raise ValueError(
            f"checkpoint {path}: it is of another model or optimizer: it lacks {missing} and has "
            f"{unknown} too many"
        )
    for name, tensor in into.items():
        here = f"{list(tensor.shape)} {tensor.dtype}"
        there = f"{list(saved[name].size)} {saved[name].properties.dtype}"
        if here != there:
            raise ValueError(
                f"checkpoint {path}: tensor {name!r} is {there} there and {here} here; use the "
                "config and the data it was saved with"
            )
    _load(path, dict(into))


def _describe(path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        described = _Reader(path).read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"checkpoint {path}: file .metadata is damaged ({error})") from error
    return {n: one for n, one in described.items() if isinstance(one, TensorStorageMetadata)}


def _load(path: Path, into: dict[str, Tensor]) -> None:
    try:
        with _one_process():
            load(into, storage_reader=_Reader(path), no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {path}: the data of its tensors is damaged") from error


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
