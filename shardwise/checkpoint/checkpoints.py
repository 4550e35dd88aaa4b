"""`Checkpoints`: saves what trains, at once or beside training, and loads it in any layout.

Every rank writes the blocks that it speaks for to a file of its own, in one folder that all of them
see; ranks exchange no data, and meet three times: when the folder is there, when all files are
whole, and when the checkpoint has its name. Loading, each rank reads the rows it holds.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.checkpoint import folder as folders
from shardwise.checkpoint.files import Block, Files, write_manifest, write_part
from shardwise.checkpoint.folder import Which, find_checkpoint
from shardwise.checkpoint.holders import together
from shardwise.checkpoint.restore import Plan, as_patterns, plan_all
from shardwise.checkpoint.source import blocks_here
from shardwise.checkpoint.state import Named, encode
from shardwise.sharding.sliced import Sizes
from shardwise.sharding.wire import Wire
from shardwise.tables.store import allocate


class PendingSave:
    """A save that may still be under way."""

    def __init__(self, path: Path) -> None:
        """Take the folder that is to be."""
        self._path = path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Path:
        """Wait for the end, and give the checkpoint's folder.

        Raises:
            Exception: What went wrong, once; on all ranks, if it did so on one.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._path


class Checkpoints:
    """The checkpoints of a run, in a folder.

    Args:
        folder: Seen by all ranks; made if absent.
        keep: How many checkpoints to leave, beside the best one.
        group: The ranks that save and load, all of which make this object and call its methods
            alike; None takes the default process group, or this process alone where there is none.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 3, group: dist.ProcessGroup | None = None
    ) -> None:
        """Connect the ranks, by process groups of their own."""
        if keep < 1:
            raise ValueError(f"checkpoints {folder}: keep must be at least 1, got {keep}")
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        is_alone = group is None or group.size() == 1
        self.folder, self.keep = Path(folder), keep
        self._wire = None if is_alone else Wire(group, name=f"checkpoints {folder}")
        self._rank = 0 if self._wire is None else self._wire.rank
        self._num_ranks = 1 if self._wire is None else self._wire.world_size
        self._pending: PendingSave | None = None
        self._copies: dict[tuple[str, Sizes], Tensor] = {}

    def save(
        self, step: int, state: Mapping[str, Any], *, is_best: bool = False, wait: bool = True
    ) -> PendingSave:
        """Write `step_<step>`; it is found only once it is whole.

        With `wait=False` only a copy is made before this returns, into memory that the next such
        save uses again; writing goes on beside training. A save waits for the one before it and
        raises what went wrong there.

        Args:
            step: Steps taken so far.
            state: Objects with a `state_dict`, tensors and values of JSON by name; mappings and
                sequences of these. What is each rank's own is marked `PerRank`; of other values
                that are not slices those of rank 0 are saved.
            is_best: Whether this is the best one so far, which stays.
            wait: Return when it is written.

        Returns:
            The save; its `result()` is the folder.

        Raises:
            OSError: The disk is full or fails; earlier checkpoints are as they were.
            TypeError: A value cannot be saved.
        """
        self.wait()
        with together(self._wire, "describing a checkpoint"):
            tensors = Named(self._rank)
            tree = encode(state, tensors)
            blocks = [*self._own_blocks(tensors)]
            if not wait:
                blocks = self._copy(blocks)
        pending = PendingSave(self.folder / f"step_{step}")

        def write() -> None:
            try:
                if not wait:
                    _give_way()
                self._write(step, blocks, tree, is_best)
            except BaseException as error:  # raised by `result`
                pending._error = error

        if wait:
            write()
            pending.result()
        else:
            pending._thread = threading.Thread(target=write, name=f"saving step {step}")
            pending._thread.start()
            self._pending = pending
        return pending

    def wait(self) -> None:
        """Wait for a save that is under way.

        Raises:
            Exception: What went wrong with it, unless its `result` has raised it.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(
        self,
        state: Mapping[str, Any],
        which: Which = "latest",
        *,
        only: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> dict[str, Any]:
        """Bring objects into a saved state, whatever layout it was saved in.

        Tensors are read in place, floats converted to the dtype that is here; a rank reads what it
        holds. Shapes and names are checked before anything changes.

        Args:
            state: The objects by the names they were saved with. Where the value is None, what was
                saved is given back, its tensors whole.
            which: The latest, the best, or that of a step.
            only: Tensors to load, by name, beginning of a name up to a dot, or pattern with `*`.
            strict: Refuse objects that have other tensors than were saved; otherwise those that
                both have are loaded.

        Returns:
            What was saved and is no tensor, and is not of `state`, by name.

        Raises:
            FileNotFoundError: There is no such checkpoint, or a file of it is missing.
            ValueError: It is damaged, in which case objects may be loaded in part, or it does not
                fit, in which case nothing has changed.
        """
        self.wait()
        name = ""
        with together(self._wire, "finding a checkpoint"):
            if self._rank == 0:
                path = find_checkpoint(self.folder, which)
                name = "" if path == self.folder else path.name
        if self._wire is not None:
            name = self._wire.gather_texts(name)[0]
        with together(self._wire, "loading a checkpoint"):
            plan = Plan(Files(self.folder / name), self._rank, as_patterns(only), strict)
            plan_all(plan, state)
            return plan.run()

    def _own_blocks(self, tensors: Named) -> Iterator[Block]:
        for name, tensor in tensors.items():
            rank = 0 if name in tensors.own else self._rank
            for here in blocks_here(tensor, rank):
                if here.is_written:
                    yield Block(name, tuple(tensor.shape), here.offsets, here.value)

    def _copy(self, blocks: Sequence[Block]) -> list[Block]:
        """Copy blocks to memory of the host that stays for the next time."""
        copies, self._copies = self._copies, {}
        result = []
        for block in blocks:
            at, value = (block.name, block.offsets), block.value
            copy = copies.pop(at, None)
            if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
                copy = allocate(tuple(value.shape), value.dtype, torch.device("cpu"))
            self._copies[at] = copy.copy_(value)
            result.append(Block(block.name, block.shape, block.offsets, copy))
        return result

    def _write(self, step: int, blocks: Sequence[Block], tree: Any, is_best: bool) -> None:
        unfinished = self.folder / f".step_{step}.unfinished"
        try:
            with together(self._wire, "preparing a checkpoint"):
                if self._rank == 0:
                    folders.start(self.folder, step)
            with together(self._wire, "writing a checkpoint"):
                write_part(unfinished, self._rank, blocks, tree)
            with together(self._wire, "finishing a checkpoint"):
                if self._rank == 0:
                    write_manifest(unfinished, self._num_ranks, step)
                    folders.finish(unfinished, step, keep=self.keep, as_best=is_best)
        except OSError as error:
            if self._rank == 0:
                folders.drop(unfinished)
            text = (
                f"checkpoint {self.folder / f'step_{step}'} could not be written: {error}; earlier "
                "checkpoints are whole; make room, or save elsewhere"
            )
            raise OSError(text) from error


def _give_way() -> None:
    """Let this thread have, of a core that training wants, a 15th; an idle one it has whole."""
    if sys.platform == "linux":  # where threads have priorities of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 12)


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 3,
    is_best: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder/step_<step>` and remove the oldest beyond `keep`; see `Checkpoints.save`.

    It connects the ranks anew each time; a run makes a `Checkpoints` once.

    Args:
        folder: Seen by all ranks; made if absent.
        step: Steps taken so far.
        state: What to save, by name.
        keep: How many checkpoints to leave, beside the best one.
        is_best: Whether this is the best one so far.
        group: The ranks, as for `Checkpoints`.

    Returns:
        The folder written.
    """
    return Checkpoints(folder, keep=keep, group=group).save(step, state, is_best=is_best).result()


def load_checkpoint(
    folder: str | Path,
    state: Mapping[str, Any],
    *,
    only: str | Sequence[str] | None = None,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Bring objects into the state of a checkpoint; see `Checkpoints.load`.

    Args:
        folder: One checkpoint, or a folder of them, of which the latest is taken.
        state: The objects by the names they were saved with.
        only: Tensors to load, by name, beginning of a name up to a dot, or pattern with `*`.
        strict: Refuse objects that have other tensors than were saved.
        group: The ranks, as for `Checkpoints`.

    Returns:
        What was saved and is no tensor, and is not of `state`, by name.
    """
    return Checkpoints(folder, group=group).load(state, only=only, strict=strict)


def read_checkpoint(
    folder: str | Path, only: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Read whole tensors into new memory, in this process alone.

    Args:
        folder: One checkpoint, or a folder of them, of which the latest is taken.
        only: As for `load_checkpoint`; None reads all.

    Raises:
        FileNotFoundError: There is none, or a file of it is missing.
        ValueError: It is damaged, or `only` names nothing.
    """
    plan = Plan(Files(find_checkpoint(folder)), 0, as_patterns(only), True)
    plan_all(plan, {})
    return {name: plan.read(name) for name in plan.files.tensors if plan.wants(name)}


def read_values(folder: str | Path) -> dict[str, Any]:
    """Read what was saved and is no tensor, by name; the files are checked for being whole.

    Args:
        folder: One checkpoint, or a folder of them, of which the latest is taken.

    Raises:
        FileNotFoundError: There is none, or a file of it is missing.
        ValueError: It is damaged.
    """
    plan = Plan(Files(find_checkpoint(folder)), 0, None, True)
    plan_all(plan, {})
    return plan.values
