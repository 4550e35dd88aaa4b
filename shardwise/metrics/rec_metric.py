"""What every metric does: keep a window and a lifetime of statistics, per task, over ranks.

Statistics are sums over examples [statistics, tasks], or with `is_raw` the examples themselves
[statistics, tasks, examples]. Ranks keep their own; `compute` adds them up (one all-reduce of a
few numbers) or gathers them, so every rank of the group must call it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from shardwise.metrics.functional import prepare

_MOST_CHUNKS = 1000


@dataclass(frozen=True)
class RecTaskInfo:
    """A task: which of a model's outputs it reads.

    Attributes:
        name: Part of the metric's key.
        label_name: Of the labels; NaN means missing.
        prediction_name: Of the predicted probabilities.
        weight_name: Of the weights; may be absent from the outputs: all 1.
    """

    name: str = "DefaultTask"
    label_name: str = "label"
    prediction_name: str = "prediction"
    weight_name: str = "weight"


class RecMetric(nn.Module):
    """A metric over a window of the latest examples, and over all of them.

    Args:
        tasks: The tasks; rows of what `update` takes.
        window_size: Examples in the window, over all ranks; each keeps its share, rounded up. Sums
            leave it by whole batches, or by 1/1000 of it where batches are smaller; the latest
            batch is always in it.
        process_group: Ranks to reduce over; None is this process alone.

    Raises:
        ValueError: There are no tasks, or two have one name.
    """

    namespace: ClassVar[str]
    num_statistics: ClassVar[int]
    is_raw: ClassVar[bool] = False
    lifetime: Tensor
    window: Tensor
    window_counts: Tensor

    def __init__(
        self,
        tasks: Sequence[RecTaskInfo] = (RecTaskInfo(),),
        *,
        window_size: int = 10_000_000,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Start with no examples."""
        super().__init__()
        self._tasks = list(tasks)
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{self.namespace}: tasks need names that differ, got {names}")
        self._process_group = process_group
        num_ranks = 1 if process_group is None else process_group.size()
        self._local_window = math.ceil(window_size / num_ranks)
        shape = (self.num_statistics, len(self._tasks))
        self.register_buffer("lifetime", torch.zeros(shape, dtype=torch.float64))
        # Chunks of statistics, oldest first, and the examples in each. Raw: one chunk per example.
        self.register_buffer("window", torch.zeros(0, *shape, dtype=torch.float64))
        self.register_buffer("window_counts", torch.zeros(0, dtype=torch.int64))
        self._pending: list[Tensor] = []  # raw examples not yet in `window`
        self._num_pending = 0

    def statistics(self, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Reduce examples [tasks, examples] to statistics."""
        raise TypeError(f"{type(self).__name__} does not say its statistics")

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Give the metric's numbers [tasks] by name."""
        raise TypeError(f"{type(self).__name__} does not say its values")

    @torch.no_grad()
    def update(
        self,
        predictions: Shaped[Tensor, "..."],
        labels: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        """Add examples.

        Args:
            predictions: Probabilities [tasks, examples], or [examples] for one task.
            labels: In [0, 1], same shape; NaN where missing.
            weights: At least 0, same shape; 0 is as a missing label.

        Raises:
            ValueError: The shapes differ.
        """
        shape = (len(self._tasks), predictions.shape[-1])
        given = [t for t in (predictions, labels, weights) if t is not None]
        if any(t.shape != given[0].shape or t.numel() != math.prod(shape) for t in given):
            raise ValueError(
                f"{self.namespace}: wants [tasks, examples] with {shape[0]} tasks, got "
                f"{[tuple(t.shape) for t in given]}"
            )
        p, y, w = prepare(*(t.detach().reshape(shape) for t in given))
        statistics = self.statistics(p, y, w)
        if self.is_raw:
            self._pending.append(statistics.movedim(-1, 0).float())
            self._num_pending += shape[1]
            if self._num_pending >= self._local_window:
                self._settle()
        else:
            self.lifetime += statistics
            self._push(statistics, shape[1])

    def _push(self, statistics: Tensor, count: int) -> None:
        """Add a chunk, or add to the last one while it is short; drop what left the window."""
        shortest = math.ceil(self._local_window / _MOST_CHUNKS)
        if self.window_counts.numel() and int(self.window_counts[-1]) < shortest:
            self.window[-1] += statistics
            self.window_counts[-1] += count
        else:
            self.window = torch.cat([self.window, statistics[None]])
            counts = self.window_counts.new_tensor([count])
            self.window_counts = torch.cat([self.window_counts, counts])
        newest_first = self.window_counts.flip(0).cumsum(0)
        kept = max(int((newest_first <= self._local_window).sum()), 1)
        self.window, self.window_counts = self.window[-kept:], self.window_counts[-kept:]

    def _settle(self) -> None:
        """Move pending raw examples into the window."""
        if self._pending:
            joined = torch.cat([self.window.float(), *self._pending])
            self.window = joined[-self._local_window :]
            self._pending, self._num_pending = [], 0

    def compute(self) -> dict[str, float]:
        """Give the numbers over all ranks of the group, by key; a collective call."""
        return self._compute(self._process_group)

    def local_compute(self) -> dict[str, float]:
        """Give the numbers of this rank's examples, by key."""
        return self._compute(None)

    @torch.no_grad()
    def _compute(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        if self.is_raw:
            self._settle()
            window = _gather(self.window.float(), group) if group else self.window
            return self._name("window_", self.values(window.movedim(0, -1)))
        both = torch.stack([self.lifetime, self.window.sum(0)])
        if group is not None:
            dist.all_reduce(both, group=group)
        lifetime = self._name("lifetime_", self.values(both[0]))
        return lifetime | self._name("window_", self.values(both[1]))

    def _name(self, prefix: str, values: dict[str, Tensor]) -> dict[str, float]:
        return {
            f"{self.namespace}-{task.name}|{prefix}{name}": float(value[i])
            for name, value in values.items()
            for i, task in enumerate(self._tasks)
        }

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As of any module; pending examples are in the window then."""
        self._settle()
        return super().state_dict(*arguments, **options)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take a window of any length."""
        self._pending, self._num_pending = [], 0
        for name in ("window", "window_counts"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape, dtype=saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _gather(examples: Float[Tensor, "..."], group: dist.ProcessGroup) -> Float[Tensor, "..."]:
    """Join the examples of all ranks, which may have different numbers of them."""
    count = torch.tensor([examples.shape[0]], device=examples.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    padded = examples.new_zeros(max(sizes), *examples.shape[1:])
    padded[: examples.shape[0]] = examples
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
