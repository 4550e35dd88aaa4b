"""The rows of a table and what an optimizer keeps for them: the unit that is placed and saved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwise.ops.lookup import advise_huge_pages
from shardwise.tables.configs import BaseEmbeddingConfig

BLOCK_ROWS = 65_536
"""Rows that are drawn from one generator when a table starts."""

PIECE_ELEMENTS = 2**16
"""Elements that are drawn at a time, so that a start needs little memory beside the rows."""


@dataclass(frozen=True)
class Part:
    """Which rows and columns of a logical table lie here, in the table's own numbering."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


class Store(nn.Module):
    """A part of one table: rows addressed by slot, and the optimizer state of each slot.

    A slot is a row number within the part. Whatever turns ids into slots stands before the lookup.

    Attributes:
        weight: The rows [num_rows, num_columns].
        states: State by name: [num_rows] or [num_rows, num_columns], float32.
        config: The whole table.
        key: The table's number in its collection, alike in every layout; keys its random bits.
        part: Where these rows and columns lie in the table.
    """

    def __init__(
        self,
        config: BaseEmbeddingConfig,
        key: int,
        device: torch.device | None = None,
        part: Part | None = None,
    ) -> None:
        """Allocate the rows, uninitialised; on `meta`, only describe them."""
        super().__init__()
        self.config = config
        self.key = key
        self.part = part or Part(0, config.num_embeddings, 0, config.embedding_dim)
        self.states: dict[str, Tensor] = {}
        rows = allocate((self.part.num_rows, self.part.num_columns), config.data_type.dtype, device)
        self.weight = nn.Parameter(rows)

    @property
    def num_embeddings(self) -> int:
        """Rows of this part."""
        return self.part.num_rows

    @property
    def embedding_dim(self) -> int:
        """Columns of this part."""
        return self.part.num_columns

    @property
    def slot(self) -> tuple[int, int, int, int]:
        """What the update operators know of the part: key, first row, first column, full width."""
        return self.key, self.part.first_row, self.part.first_column, self.config.embedding_dim

    def cut(self, value: Tensor) -> Tensor:
        """View the part's own of a value of the whole table: [rows] or [rows, columns]."""
        part = self.part
        rows = value[part.first_row : part.first_row + part.num_rows]
        if value.dim() == 1:
            return rows
        return rows[:, part.first_column : part.first_column + part.num_columns]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Store":
        """Move the states along with the rows; they stay float32, and the same objects."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        device = self.weight.device
        for state in self.states.values():
            if state.device != device and not (state.is_meta or self.weight.is_meta):
                state.data = state.data.to(device)
        return self

    def extra_repr(self) -> str:
        """Show the size in `print(module)`."""
        rows, columns = self.weight.shape
        return f"{rows}, {columns}, dtype={self.weight.dtype}"

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Draw the start of the rows. Nothing on `meta`.

        Each block of 65,536 rows of the whole table has a random state of its own, made from
        (seed, key, block), so that every layout of the table starts with the same numbers.
        """
        if self.weight.is_meta:
            return
        part = self.part
        last_row = part.first_row + part.num_rows
        for block in range(part.first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
            columns = slice(part.first_column, part.first_column + part.num_columns)
            for drawn, rows in self._draw(block, seed):
                first, last = max(drawn, part.first_row), min(drawn + rows.shape[0], last_row)
                if first < last:
                    own = rows[first - drawn : last - drawn, columns]
                    self.weight[first - part.first_row : last - part.first_row].copy_(own)
                if last == last_row:  # what is drawn after them is not ours
                    break

    def _draw(self, block: int, seed: int) -> Iterator[tuple[int, Tensor]]:
        """Draw the whole rows of a block, in pieces with the number of their first row."""
        width, device = self.config.embedding_dim, self.weight.device
        start = block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, self.config.num_embeddings)
        seed = _mix_seed(seed, self.key, block)
        if self.config.init_fn is not None:
            rows = torch.empty(stop - start, width, device=device)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                filled = self.config.init_fn(rows)
            # A function may give a new tensor.
            yield start, rows if filled is None else filled.view_as(rows)
            return
        generator = torch.Generator(device).manual_seed(seed)
        low, high = self.config.get_weight_init_min(), self.config.get_weight_init_max()
        piece_rows = max(1, PIECE_ELEMENTS // width)
        for first in range(start, stop, piece_rows):
            rows = torch.empty(min(piece_rows, stop - first), width, device=device)
            yield first, rows.uniform_(low, high, generator=generator)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Allocate memory for rows or their state, in 2 MB pages where the system has them."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    if memory.device.type == "cpu":
        advise_huge_pages(memory)
    return memory


def _mix_seed(seed: int, key: int, block: int) -> int:
    """Spread (seed, key, block) over 63 bits; the multipliers are those of SplitMix64."""
    mixed = seed
    for word in (key + 1, block + 1):
        mixed = (mixed + word * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
