"""What every metric does: keep a window and a lifetime of statistics, per task, over ranks.

Statistics are sums over examples [sums, tasks], or with `is_raw` the examples of the window
themselves [3, tasks, examples]. Ranks keep their own; `compute` adds them up (one all-reduce of a
few numbers) or gathers them, so every rank of the group must call it.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from shardwise.metrics.functional import prepare
from shardwise.metrics.metrics_config import RecTaskInfo
from shardwise.metrics.windows import ExampleWindow, SumWindow


@dataclass(frozen=True, kw_only=True)
class Examples:
    """K batches of B examples each, as a metric gets them.

    Attributes:
        predictions: [tasks, K, B], float64, as are the next two; 0 where absent.
        labels: 0 where absent.
        weights: 0 where the label is missing.
        is_missing: Where the label is.
        extra: The output that the metric asked for, as it came; [tasks, K, B].
        moments: When each batch came, in seconds.
    """

    predictions: Tensor
    labels: Tensor
    weights: Tensor
    is_missing: Tensor
    extra: Tensor | None
    moments: Sequence[float]

    @property
    def is_present(self) -> Tensor:
        """Where an example counts: as 1, elsewhere 0."""
        return (self.weights != 0).double()

    def named_extra(self) -> Tensor:
        """Give the output that the metric asked for.

        Raises:
            ValueError: There is none.
        """
        if self.extra is None:
            raise ValueError("this metric reads a further output; give update its `extra`")
        return self.extra


def totals(*terms: Tensor) -> Tensor:
    """Sum each term [tasks, K, B] or [tasks, K, B, classes] over a batch."""
    return torch.stack([term.flatten(2).sum(-1) for term in terms])


class RecMetric(nn.Module):
    """A metric over a window of the latest examples, and over all of them.

    Args:
        tasks: The tasks; rows of what `update` takes.
        window_size: Examples in the window, over all ranks; each keeps its share, rounded up. Sums
            leave it by whole batches, or by 1/1000 of it where batches are smaller; the latest
            batch is always in it.
        process_group: Ranks to reduce over; None is this process alone.
        arguments: What this metric takes beside; `defaults` names them.

    Raises:
        ValueError: There are no tasks, two have one name, a name of `arguments` is unknown, or
            the window is empty.
    """

    namespace: ClassVar[str]
    num_sums: ClassVar[int] = 2
    is_raw: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    """Whether predictions have one more dim: [examples, classes]."""
    has_label_classes: ClassVar[bool] = False
    """Whether labels have it too."""
    keeps_one_batch: ClassVar[bool] = False
    """Whether the window is the latest batch, whatever `window_size` says."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    lifetime: Tensor

    def __init__(
        self,
        tasks: Sequence[RecTaskInfo] = (RecTaskInfo(),),
        *,
        window_size: int = 10_000_000,
        process_group: dist.ProcessGroup | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Start with no examples."""
        super().__init__()
        self.tasks = tuple(tasks)
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{self.namespace}: tasks need names that differ, got {names}")
        unknown = sorted(set(arguments or {}) - set(self.defaults))
        if unknown:
            raise ValueError(
                f"{self.namespace}: takes the arguments {sorted(self.defaults)}, got {unknown}"
            )
        self.arguments = {**self.defaults, **(arguments or {})}
        self.process_group = process_group
        size = math.ceil(window_size / (1 if process_group is None else process_group.size()))
        if size < 1:
            raise ValueError(f"{self.namespace}: window_size must be at least 1, got {window_size}")
        if self.keeps_one_batch:
            size = 1  # the latest batch is in the window, however small that is
        shape = (self.count_sums(), len(self.tasks))
        self.register_buffer("lifetime", torch.zeros(shape, dtype=torch.float64))
        self.window = ExampleWindow(*shape, size) if self.is_raw else SumWindow(*shape, size)

    def count_sums(self) -> int:
        """Say how many statistics there are per task; where `is_raw`, three."""
        return 3 if self.is_raw else self.num_sums

    def extra_name(self, task: RecTaskInfo) -> str | None:
        """Name the output that the metric reads beside predictions, labels and weights."""
        return None

    def statistics(self, examples: Examples) -> Tensor:
        """Reduce batches to statistics [sums, tasks, K]; not asked where `is_raw`."""
        raise TypeError(f"{type(self).__name__} does not say its statistics")

    def values(self, statistics: Tensor) -> dict[str, Tensor]:
        """Give the metric's numbers [tasks] by name; if not said, the first sum over the last.

        A single sum is given as it is.
        """
        is_ratio = len(statistics) > 1
        return {self.namespace: statistics[0] / statistics[-1] if is_ratio else statistics[0]}

    @torch.no_grad()
    def update(
        self,
        predictions: Shaped[Tensor, "..."],
        labels: Shaped[Tensor, "..."],
        weights: Shaped[Tensor, "..."] | None = None,
        extra: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predictions: Probabilities or numbers [tasks, examples], or [examples] for one task;
                with one more dim where the metric is of classes.
            labels: [tasks, examples] or [examples], with that dim if they have it; NaN where
                missing.
            weights: At least 0, [tasks, examples] or [examples]; 0 is as a missing label.
            extra: The output that the metric reads beside, as weights.

        Raises:
            ValueError: The shapes differ.
        """
        plain = [
            predictions[..., 0] if self.has_classes else predictions,
            labels[..., 0] if self.has_label_classes else labels,
        ]
        shapes = [tuple(t.shape) for t in (*plain, weights, extra) if t is not None]
        shape = (len(self.tasks), 1, shapes[0][-1] if shapes[0] else 1)
        if len(set(shapes)) > 1 or plain[0].numel() != math.prod(shape):
            raise ValueError(
                f"{self.namespace}: wants [tasks, examples] with {shape[0]} tasks, got {shapes}"
            )
        classes = predictions.shape[len(shapes[0]) :]
        examples = prepare_examples(
            predictions.detach().reshape(*shape, *classes),
            labels.reshape(*shape, *labels.shape[len(shapes[0]) :]),
            torch.ones_like(plain[0]).reshape(shape) if weights is None else weights.reshape(shape),
            [time.perf_counter()],
        )
        self.add(examples, None if extra is None else extra.reshape(shape))

    @torch.no_grad()
    def add(self, examples: Examples, extra: Tensor | None = None) -> None:
        """Add batches that are prepared."""
        if extra is not None:
            examples = replace(examples, extra=extra)
        if isinstance(self.window, ExampleWindow):
            rows = (examples.predictions, examples.labels, examples.weights)
            self.window.add(torch.stack([row.flatten(1) for row in rows]).float())
        else:
            statistics = self.statistics(examples).to(self.lifetime.device)
            self.lifetime += statistics.sum(-1)
            self.window.add(statistics, examples.weights.shape[2])

    def compute(self) -> dict[str, float]:
        """Give the numbers over all ranks of the group, by key; a collective call."""
        return self._compute(self.process_group)

    def local_compute(self) -> dict[str, float]:
        """Give the numbers of this rank's examples, by key."""
        return self._compute(None)

    @torch.no_grad()
    def _compute(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        if isinstance(self.window, ExampleWindow):
            rows = self.window.examples()
            rows = rows if group is None else _gather(rows, group)
            return self.name_values(self.values(rows), ["window_"])
        both = self.reduce(torch.cat([self.lifetime, self.window.total()], dim=1), group)
        return self.name_values(self.values(both), ["lifetime_", "window_"])

    def reduce(
        self, statistics: Float[Tensor, "S N"], group: dist.ProcessGroup | None
    ) -> Float[Tensor, "S N"]:
        """Sum over the ranks of a group."""
        if group is not None:
            dist.all_reduce(statistics, group=group)
        return statistics

    def name_values(
        self, values: Mapping[str, Tensor], prefixes: Sequence[str]
    ) -> dict[str, float]:
        """Give the numbers by key: of each prefix, those of all tasks."""
        keys = [(prefix, task.name) for prefix in prefixes for task in self.tasks]
        return {
            f"{self.namespace}-{task}|{prefix}{name}": number
            for name, value in values.items()
            for (prefix, task), number in zip(keys, value.tolist(), strict=True)
        }


def prepare_examples(
    predictions: Tensor, labels: Tensor, weights: Tensor, moments: Iterable[float]
) -> Examples:
    """Prepare batches for metrics; a weight holds for all classes of its example."""
    if labels.dim() > weights.dim():
        weights = weights.unsqueeze(-1).expand_as(labels)
    if predictions.dim() > labels.dim():
        p, (_, y, w) = predictions.double(), prepare(labels, labels, weights)
        p = p.masked_fill((w == 0).unsqueeze(-1), 0.0)
    else:
        p, y, w = prepare(predictions, labels, weights)
    return Examples(
        predictions=p,
        labels=y,
        weights=w,
        is_missing=labels.isnan(),
        extra=None,
        moments=list(moments),
    )


def _gather(examples: Float[Tensor, "S T N"], group: dist.ProcessGroup) -> Float[Tensor, "S T M"]:
    """Join the examples of all ranks, which may have different numbers of them."""
    examples = examples.movedim(-1, 0)
    count = torch.tensor([examples.shape[0]], device=examples.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    padded = examples.new_zeros(max(sizes), *examples.shape[1:])
    padded[: examples.shape[0]] = examples
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows.movedim(0, -1)
