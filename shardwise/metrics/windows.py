"""What a metric remembers of the latest examples: sums over batches, or the examples themselves."""

from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_MOST_CHUNKS = 1000


class Store(nn.Module):
    """A module whose checkpoint is what `contents` gives, of any shape."""

    def contents(self) -> dict[str, Tensor]:
        """Give what a checkpoint keeps, by name; oldest first."""
        raise TypeError(f"{type(self).__name__} does not say its contents")

    def restore(self, contents: dict[str, Tensor]) -> None:
        """Take what `contents` gave."""
        raise TypeError(f"{type(self).__name__} does not say how to restore its contents")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self.contents().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        names = list(self.contents())
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        missing_keys += missing
        if not missing:
            self.restore({name: state_dict[prefix + name] for name in names})


class SumWindow(Store):
    """Sums over the latest batches.

    Batches leave it whole, or by 1/1000 of `size` where they are smaller, so at most 1001 sums are
    kept; the latest batch is always in it.

    Args:
        num_sums: Sums per task.
        num_tasks: Tasks.
        size: Examples in it.
    """

    chunks: Tensor  # [chunks, sums, tasks]; oldest first

    def __init__(self, num_sums: int, num_tasks: int, size: int) -> None:
        """Start empty."""
        super().__init__()
        self.size = size
        empty = torch.zeros(0, num_sums, num_tasks, dtype=torch.float64)
        self.register_buffer("chunks", empty, persistent=False)
        self._counts: list[int] = []  # examples in each chunk

    def add(self, sums: Float[Tensor, "S T K"], count: int) -> None:
        """Add K batches of `count` examples each."""
        shortest = -(-self.size // _MOST_CHUNKS)
        chunk_of = []
        for _ in range(sums.shape[2]):
            if self._counts and self._counts[-1] < shortest:
                self._counts[-1] += count
            else:
                self._counts.append(count)
            chunk_of.append(len(self._counts) - 1)
        old = self.chunks
        new = old.new_zeros(len(self._counts) - len(old), *old.shape[1:])
        index = torch.tensor(chunk_of, device=old.device)
        chunks = torch.cat([old, new]).index_add_(0, index, sums.movedim(2, 0).to(old.device))
        newest_first = accumulate(reversed(self._counts))
        kept = max(sum(total <= self.size for total in newest_first), 1)
        self.chunks, self._counts = chunks[-kept:], self._counts[-kept:]

    def total(self) -> Float[Tensor, "S T"]:
        """Sum all of it."""
        return self.chunks.sum(0)

    def contents(self) -> dict[str, Tensor]:
        """Give the sums and how many examples each covers."""
        return {"chunks": self.chunks, "counts": torch.tensor(self._counts, dtype=torch.int64)}

    def restore(self, contents: dict[str, Tensor]) -> None:
        """Take what `contents` gave."""
        self.chunks = contents["chunks"].to(self.chunks, copy=True)
        self._counts = contents["counts"].tolist()


class ExampleWindow(Store):
    """The latest examples, in float32: 4 bytes times columns times tasks for each.

    Adding costs the batch alone: the rows grow by doubling up to `size`, then the oldest are
    overwritten.

    Args:
        num_columns: Numbers per example and task.
        num_tasks: Tasks.
        size: Examples in it.
    """

    rows: Tensor  # [columns, tasks, capacity]

    def __init__(self, num_columns: int, num_tasks: int, size: int) -> None:
        """Start empty."""
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.zeros(num_columns, num_tasks, 0), persistent=False)
        self._num_seen = 0

    def add(self, examples: Float[Tensor, "S T N"]) -> None:
        """Add the latest examples, oldest first."""
        examples = examples[..., -self.size :].to(self.rows)
        count, capacity = examples.shape[-1], self.rows.shape[-1]
        wanted = min(self._num_seen + count, self.size)
        if wanted > capacity:
            grown = min(max(2 * capacity, wanted), self.size)
            more = self.rows.new_zeros(*self.rows.shape[:2], grown - capacity)
            self.rows = torch.cat([self.rows, more], dim=-1)
        start = self._num_seen % self.size
        before_end = min(count, self.size - start)
        self.rows[..., start : start + before_end] = examples[..., :before_end]
        self.rows[..., : count - before_end] = examples[..., before_end:]
        self._num_seen += count

    def examples(self) -> Float[Tensor, "S T N"]:
        """Give them, in no order."""
        return self.rows[..., : self._num_seen]

    def contents(self) -> dict[str, Tensor]:
        """Give the examples."""
        start = self._num_seen % self.size if self._num_seen > self.size else 0
        return {"rows": self.examples().roll(-start, -1)}

    def restore(self, contents: dict[str, Tensor]) -> None:
        """Take what `contents` gave."""
        self.rows, self._num_seen = self.rows[..., :0], 0
        self.add(contents["rows"])
