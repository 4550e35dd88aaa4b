"""Examples per second of training, as a wall clock sees it."""

import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.metrics.metrics_config import BatchSizeStage
from shardwise.metrics.windows import Store

_LONGEST_WINDOW_S = 2 * 60 * 60
_MOST_MARKS = 1000


class ThroughputMetric(Store):
    """Examples per second over a window of time and since warm-up, and all examples so far.

    Steps are taken to have full batches on all ranks. Only the numbers of steps and examples are
    saved: a run that is resumed warms up anew.

    Args:
        batch_size: Examples of a step, on each rank.
        world_size: Ranks.
        window_seconds: Length of the window, at most two hours. Time leaves it in thousandths.
        warmup_steps: Steps before the clock starts.
        batch_size_stages: Batch sizes that take turns, in place of `batch_size`.

    Raises:
        ValueError: A number is out of range, or a stage without end is not the last.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        world_size: int,
        window_seconds: int | float,
        warmup_steps: int = 100,
        batch_size_stages: Sequence[BatchSizeStage] | None = None,
    ) -> None:
        """Start with no examples."""
        super().__init__()
        stages = list(batch_size_stages or [BatchSizeStage(batch_size)])
        if min(batch_size, world_size) < 1 or warmup_steps < 0:
            raise ValueError(
                "throughput: batch_size and world_size must be at least 1 and warmup_steps 0, got "
                f"{batch_size}, {world_size} and {warmup_steps}"
            )
        if not 0 < window_seconds <= _LONGEST_WINDOW_S:
            raise ValueError(
                f"throughput: window_seconds must be above 0 and at most {_LONGEST_WINDOW_S}, got "
                f"{window_seconds}"
            )
        if [stage for stage in stages if stage.max_iters is None] != stages[-1:]:
            raise ValueError(
                f"throughput: the last batch size stage, and no other, has max_iters None: {stages}"
            )
        self._stages, self._world_size = stages, world_size
        self._window_s, self._warmup_steps = window_seconds, warmup_steps
        self._num_steps, self._num_examples = 0, 0
        # Moments since the end of warm-up and the examples before each: when warm-up ended, the
        # latest update, and between them what the window needs, at most 1001.
        self._marks: deque[tuple[float, int]] = deque()
        self._first: tuple[float, int] | None = None
        self._latest: tuple[float, int] | None = None
        self._num_updates = 0

    def update(self) -> None:
        """Count a step that has just ended."""
        self._num_examples += self._step_size() * self._world_size
        self._num_steps += 1
        self._num_updates += 1
        if self._num_updates < self._warmup_steps:
            return
        self._latest = (time.perf_counter(), self._num_examples)
        self._first = self._first or self._latest
        now, marks = self._latest[0], self._marks
        if not marks or now - marks[-1][0] >= self._window_s / _MOST_MARKS:
            marks.append(self._latest)
        while len(marks) > 1 and marks[1][0] <= now - self._window_s:
            marks.popleft()

    def compute(self) -> dict[str, float]:
        """Give the numbers by key; those per second only after warm-up."""
        numbers = {"total_examples": float(self._num_examples)}
        if self._latest is not None and self._first is not None:
            for name, start in (("lifetime", self._first), ("window", self._marks[0])):
                seconds = self._latest[0] - start[0]
                if seconds > 0:
                    rate = (self._latest[1] - start[1]) / seconds
                    numbers[f"{name}_throughput"] = rate
        return {f"throughput-throughput|{name}": value for name, value in numbers.items()}

    def _step_size(self) -> int:
        end = 0
        for stage in self._stages[:-1]:
            end += stage.max_iters or 0
            if self._num_steps < end:
                return stage.batch_size
        return self._stages[-1].batch_size

    def contents(self) -> dict[str, Tensor]:
        """Give how many steps and examples there were."""
        counts = {"num_steps": self._num_steps, "total_examples": self._num_examples}
        return {name: torch.tensor(count) for name, count in counts.items()}

    def restore(self, contents: dict[str, Tensor]) -> None:
        """Take what `contents` gave; the clock starts anew."""
        self._num_steps = int(contents["num_steps"])
        self._num_examples = int(contents["total_examples"])
        self._marks, self._first, self._latest = deque(), None, None
        self._num_updates = 0
