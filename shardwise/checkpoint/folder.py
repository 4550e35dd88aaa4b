"""The folder of a run's checkpoints: which there are, which is the best, which go.

A checkpoint is a folder `step_<n>`, complete or absent: it is written under another name and
renamed. What a crash leaves behind begins with a dot and goes with the next save.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Literal, TypeAlias

Which: TypeAlias = Literal["latest", "best"] | int

MANIFEST = "manifest.json"
_BEST = "best"
_NAME = re.compile(r"step_(\d+)|\.step_(\d+)\.replaced")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the checkpoints in a folder, the latest last; none where there is no such folder."""
    found = {}
    for path in sorted(Path(folder).glob("*step_*")):  # names with a dot come first
        if named := _NAME.fullmatch(path.name):
            found[int(named[1] or named[2])] = path  # a replaced one counts where its heir is not
    return [found[step] for step in sorted(found)]


def find_checkpoint(folder: str | Path, which: Which = "latest") -> Path:
    """Give the folder itself if it is one checkpoint, else one of those in it.

    Args:
        folder: Of a run, or one checkpoint.
        which: The latest, the latest that was saved as best so far, or that of a step.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    found = {_step(path): path for path in list_checkpoints(folder)}
    if which == "best":
        found = {step: path for step, path in found.items() if is_best(path)}
    elif which != "latest":
        found = {step: path for step, path in found.items() if step == which}
    if found:
        return found[max(found)]
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder}: no such folder; name one that was saved to")
    what = "step_<n>" if which == "latest" else f"step_{which}" if which != "best" else "best one"
    steps = [_step(path) for path in list_checkpoints(folder)]
    raise FileNotFoundError(f"checkpoint {folder}: no {what} in this folder, only steps {steps}")


def is_best(path: Path) -> bool:
    """Whether a checkpoint was saved as the best so far."""
    return (path / _BEST).is_file()


def _step(path: Path) -> int:
    named = _NAME.fullmatch(path.name)
    assert named is not None, "of those that were listed"
    return int(named[1] or named[2])


def start(folder: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written, and clear what crashes have left."""
    kept = list_checkpoints(folder)
    for left in folder.glob(".step_*"):
        if left not in kept:
            shutil.rmtree(left, ignore_errors=True)
    unfinished = folder / f".step_{step}.unfinished"
    unfinished.mkdir(parents=True)
    return unfinished


def finish(unfinished: Path, step: int, *, keep: int, as_best: bool) -> Path:
    """Give a checkpoint its name once all its files are whole, then remove old ones.

    The latest `keep` stay, and the best one.
    """
    path, replaced = (
        unfinished.parent / f"step_{step}",
        unfinished.parent / f".step_{step}.replaced",
    )
    if as_best:
        (unfinished / _BEST).touch()
    sync(unfinished)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.rename(path)
    sync(path.parent)
    found = list_checkpoints(path.parent)
    best = [one for one in found if is_best(one)][-1:]
    for old in found[:-keep]:
        if old not in best:
            removed = old.parent / f".{old.name.strip('.')}.removed"
            old.rename(removed)  # at once, so that no half of it is ever found
            shutil.rmtree(removed)
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def drop(unfinished: Path) -> None:
    """Remove what could not be finished, as far as that goes."""
    shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
