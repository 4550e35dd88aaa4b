"""Pretrained rows into a table, sharded or not, with a map from them to the table's ids."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from shardwise.checkpoint.holders import mark_changed
from shardwise.checkpoint.source import PIECE_BYTES, Here, blocks_here
from shardwise.checkpoint.tensor_file import TensorFile
from shardwise.sharding.model_parallel import get_unwrapped_module

_Array = Shaped[np.ndarray, "..."]


def load_rows(
    model: nn.Module,
    table: str,
    rows: Tensor | _Array | str | Path,
    ids: Int[Tensor, " N"],
    *,
    tensor: str | None = None,
) -> int:
    """Copy given rows into a table; its other rows, and optimizer state, stay as they are.

    If the model is sharded, each rank calls this with all rows, of which it reads those of its own
    slices: give a file or a memory map where they are many. Floats of another dtype are converted
    as PyTorch does: rounded to the nearest.

    Args:
        model: Holds the table.
        table: Its name in the state dict, say "sparse.embedding_bags.item.weight".
        rows: The rows [N, D], as a tensor, an array, or the path of a `.npy` or safetensors file.
        ids: The row of the table that each of them is for; negative: it is left out.
        tensor: The name of the rows in a safetensors file that has several tensors.

    Returns:
        How many rows were given, those left out not counted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such table, or rows or ids do not fit it; nothing has changed.
    """
    state = get_unwrapped_module(model).state_dict()
    if table not in state or not isinstance(state[table], Tensor) or state[table].dim() != 2:
        known = [n for n, v in state.items() if isinstance(v, Tensor) and v.dim() == 2]
        raise ValueError(f"the model has no table {table!r}; it has {known}")
    into = state[table]
    source = _open(rows, tensor)
    is_float = (
        source.dtype.kind == "f" if isinstance(source, np.ndarray) else source.is_floating_point()
    )
    if len(source.shape) != 2 or source.shape[1] != into.shape[1] or not is_float:
        raise ValueError(
            f"table {table!r}: rows must be floats [N, {into.shape[1]}], got {list(source.shape)} "
            f"{source.dtype}"
        )
    _check_ids(table, ids, source.shape[0], into.shape[0])
    with torch.no_grad():
        for here in blocks_here(into):
            _fill(here, source, ids.cpu())
    mark_changed(get_unwrapped_module(model), table.removesuffix("weight"))
    return int((ids >= 0).sum())


def _open(rows: Any, tensor: str | None) -> Tensor | _Array:
    if isinstance(rows, Tensor):
        return rows.detach()
    if isinstance(rows, np.ndarray):
        return rows
    path = Path(rows)
    if path.suffix == ".npy":
        return _open_npy(path)
    file = TensorFile(path)
    names = [*file.entries] if tensor is None else [tensor]
    if len(names) != 1 or names[0] not in file.entries:
        raise ValueError(f"safetensors file {path}: tensor={tensor!r}, it has {[*file.entries]}")
    return file.read(names[0])


def _open_npy(path: Path) -> _Array:
    if not path.is_file():
        raise FileNotFoundError(f"npy file {path}: there is no such file")
    try:
        array: _Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"npy file {path}: it is damaged or of another format ({error})"
        ) from error
    return array


def _take(source: Tensor | _Array, places: Tensor, columns: slice) -> Tensor:
    """Copy some columns of some rows into new memory."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source[places.numpy(), columns])
    return source[places.to(source.device), columns]


def _check_ids(table: str, ids: Tensor, num_given: int, num_rows: int) -> None:
    if ids.dim() != 1 or ids.shape[0] != num_given or ids.is_floating_point():
        raise ValueError(
            f"table {table!r}: ids must be one integer for each of {num_given} rows, got "
            f"{list(ids.shape)} {ids.dtype}"
        )
    if (ids >= num_rows).any():
        at = int((ids >= num_rows).nonzero()[0])
        raise ValueError(
            f"table {table!r}: ids[{at}] is {int(ids[at])}, the table has ids 0 to {num_rows - 1}"
        )
    found, counts = ids[ids >= 0].unique(return_counts=True)
    if (counts > 1).any():
        repeated = int(found[counts > 1][0])
        places = (ids == repeated).nonzero()[:2].flatten().tolist()
        raise ValueError(f"table {table!r}: id {repeated} is given twice, in ids at {places}")


def _fill(here: Here, source: Tensor | _Array, ids: Tensor) -> None:
    """Copy what belongs to a block, in the order of the source."""
    (first_row, first_column), (num_rows, num_columns) = here.offsets, here.value.shape
    places = ((ids >= first_row) & (ids < first_row + num_rows)).nonzero().flatten()
    columns = slice(first_column, first_column + num_columns)
    for chosen in places.split(max(1, PIECE_BYTES // (8 * max(1, num_columns)))):
        given = _take(source, chosen, columns).to(here.value.device, here.value.dtype)
        here.value[(ids[chosen].long() - first_row).to(here.value.device)] = given
