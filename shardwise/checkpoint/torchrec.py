"""Checkpoints that TorchRec's users have saved with torch's distributed checkpoint.

TorchRec cuts tables as its plan says; the blocks go into whatever layout is here. It names the
first state of a table `<table>.momentum1` and the others by their own names. Row-wise Adagrad keeps
one sum per row *and block of columns* there, block after block in the order of the columns, each
the mean of squares over the columns of its block; here there is one sum per row, the mean over all
columns. So sums of several blocks are merged to their mean, weighted with the widths of the blocks:
what training with whole rows would have had from the same gradients.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shardwise.checkpoint.holders import mark_changed, some_of, tensors_of, together, wire_of
from shardwise.checkpoint.source import Chunk, Described, check_fit, fill
from shardwise.checkpoint.torch_folder import TorchFolder
from shardwise.optim import KeyedOptimizer


def load_torchrec_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: KeyedOptimizer | None = None,
    *,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    steps: int | None = None,
    strict: bool = True,
) -> None:
    """Copy the state of a model of TorchRec's, and of its optimizer, into one of the same names.

    Whatever plan and number of ranks saved it, and whatever is here: each rank reads its blocks,
    and all ranks of a sharded model call this. Names and shapes are checked before anything
    changes; floats of another dtype are rounded. The options of optimizers, the learning rate among
    them, are pickled there and not read.

    Args:
        path: What was given as `checkpoint_id` to `torch.distributed.checkpoint.save`.
        model: Has tables of the same names, under the same names of modules.
        optimizer: As `in_backward` gives it, or a `CombinedOptimizer` of it and of others whose
            names are the same there; None leaves optimizers alone.
        model_key: The key of the model in what was saved; "" if that was its state dict itself.
        optimizer_key: The key of the optimizer.
        steps: How many steps the tables' optimizer had taken, which TorchRec does not save. Rules
            whose bias correction counts steps (Adam, LAMB) need it; 0 is how TorchRec itself goes
            on.
        strict: Whether the names must be the same on both sides.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the state is of another model or optimizer.
    """
    into = {_join(model_key, name): value for name, value in tensors_of(model).items()}
    prefixes = [_join(model_key, "")]
    with together(wire_of(into), f"loading {Path(path).name}"):
        folder = TorchFolder(Path(path))
        saved = dict(folder.tensors)
        if optimizer is not None:
            optimizer.init_state()
            prefixes.append(_join(optimizer_key, "state."))
            for parameter, states in optimizer.state_dict()["state"].items():
                name = f"{prefixes[1]}{parameter}"
                weight = saved.get(_join(model_key, parameter))
                into |= _pair_states(saved, name, states, weight, steps)
        _check_names(folder, saved, into, prefixes if strict else None)
        files = _Translated(folder, saved)
        pairs = [(name, tensor) for name, tensor in into.items() if name in saved]
        for name, tensor in pairs:
            check_fit(files, name, tensor)
        for name, tensor in pairs:
            fill(files, name, tensor)
        mark_changed(model)
        if optimizer is not None:
            _count_steps(optimizer, steps)
            optimizer.post_load_state_dict()


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _pair_states(
    saved: dict[str, Described],
    name: str,
    states: Mapping[str, Tensor],
    weight: Described | None,
    steps: int | None,
) -> dict[str, Tensor]:
    """Find the saved names of a parameter's states; merge those of blocks of columns.

    Args:
        saved: What there is, by name; a state that is merged takes the place of its blocks.
        name: Of the parameter in the optimizer's state.
        states: Of the optimizer here.
        weight: The parameter, if it was saved.
        steps: Given by the user.
    """
    if any(f"{name}.{kind}" in saved for kind in states):  # of an optimizer that is not fused
        return {f"{name}.{kind}": value for kind, value in states.items()}
    kinds = [kind for kind in states if kind != "step"]
    if steps is None and "exp_avg" in kinds:
        raise ValueError(
            f"optimizer state {name!r}: TorchRec saves no number of steps, which the bias "
            "correction needs; give steps=…, or steps=0 for how TorchRec itself goes on"
        )
    table = name.split(".")[-2]
    found = {}
    for kind in kinds:
        key = f"{name}.{table}.{'momentum1' if kind == kinds[0] else kind}"
        found[key] = states[kind]
        if key in saved and weight is not None and states[kind].dim() == 1:
            saved[key] = _merge(saved[key], weight)
    return found


def _check_names(
    folder: TorchFolder,
    saved: Mapping[str, Described],
    into: Mapping[str, Tensor],
    prefixes: Sequence[str] | None,
) -> None:
    """Check that names are the same, or if no prefixes are given that there are any."""
    there = [name for name in saved if name.startswith(tuple(prefixes or ("",)))]
    missing, unknown = sorted(into.keys() - saved.keys()), sorted({*there} - into.keys())
    if (missing or unknown) if prefixes else len(missing) == len(into):
        raise ValueError(
            f"checkpoint {folder.name}: it is of another model or optimizer, or under other keys: "
            f"it lacks {some_of(missing)} and has {some_of(unknown)} too many; its keys are "
            f"{sorted({name.partition('.')[0] for name in saved})}"
        )


def _count_steps(optimizer: KeyedOptimizer, steps: int | None) -> None:
    states: Iterable[Mapping[str, Tensor]] = optimizer.state_dict()["state"].values()
    for state in states:
        if steps is not None and "step" in state:
            state["step"].fill_(steps)


# ---- row states of tables whose columns were cut


@dataclass(frozen=True)
class _Blocks:
    """A row state that was kept once per block of columns: [blocks x rows], and their widths."""

    state: Described
    widths: Sequence[int]


def _merge(state: Described, weight: Described) -> Described:
    """Describe the mean over the blocks of columns, if the state has one per block."""
    rows = weight.shape[0]
    columns = sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in weight.chunks})
    widths = [width for _, width in columns if width]
    if len(widths) < 2 or state.shape != (rows * len(widths),):
        return state
    return Described((rows,), state.dtype, [Chunk((0,), (rows,), _Blocks(state, widths))])


class _Translated:
    """The tensors of a folder, with row states merged."""

    def __init__(self, folder: TorchFolder, tensors: Mapping[str, Described]) -> None:
        self._folder = folder
        self.name, self.tensors = folder.name, tensors

    def read(self, name: str, chunk: Chunk, rows: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Read rows; those that are merged in one piece of what was asked for."""
        if isinstance(chunk.place, _Blocks):
            yield rows[0], self._mean(name, chunk.place, rows)
        else:
            yield from self._folder.read(name, chunk, rows)

    def _mean(self, name: str, blocks: _Blocks, rows: tuple[int, int]) -> Tensor:
        total = torch.zeros(rows[1] - rows[0], dtype=torch.float64)
        num_rows = self.tensors[name].shape[0]
        for number, width in enumerate(blocks.widths):
            begin, end = (number * num_rows + row for row in rows)
            for chunk in blocks.state.chunks:
                first = max(begin, chunk.offsets[0])
                last = min(end, chunk.offsets[0] + chunk.sizes[0])
                asked = first - chunk.offsets[0], last - chunk.offsets[0]
                for at, values in self._folder.read(name, chunk, asked) if first < last else ():
                    low, high = max(at, asked[0]), min(at + values.shape[0], asked[1])
                    into = total[low - asked[0] + first - begin :][: high - low]
                    into += width * values[low - at : high - at].double()
        return (total / sum(blocks.widths)).to(blocks.state.dtype)
