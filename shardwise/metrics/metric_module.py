"""Several metrics that read one model's outputs."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.metrics.rec_metric import RecMetric, RecTaskInfo


class RecMetricModule(nn.Module):
    """Metrics of the same tasks, updated together.

    Args:
        metrics: Their classes.
        tasks: Which outputs of the model they read.
        window_size: Examples in the window, over all ranks.
        process_group: Ranks to reduce over; None is this process alone.

    Raises:
        ValueError: There are no tasks, two have one name, or a metric comes twice.
    """

    def __init__(
        self,
        metrics: Sequence[type[RecMetric]],
        tasks: Sequence[RecTaskInfo] = (RecTaskInfo(),),
        *,
        window_size: int = 10_000_000,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Make the metrics."""
        super().__init__()
        self._tasks = list(tasks)
        namespaces = [metric.namespace for metric in metrics]
        if len(set(namespaces)) < len(namespaces):
            raise ValueError(f"RecMetricModule: each metric may come once, got {namespaces}")
        self._metrics = [
            metric(tasks, window_size=window_size, process_group=process_group)
            for metric in metrics
        ]
        self.rec_metrics = nn.ModuleDict({metric.namespace: metric for metric in self._metrics})

    def update(self, model_out: Mapping[str, Tensor]) -> None:
        """Add a batch: predictions, labels and, where there are any, weights by their names.

        Raises:
            KeyError: An output that a task reads is missing.
        """
        names = [n for task in self._tasks for n in (task.prediction_name, task.label_name)]
        missing = sorted(set(names) - set(model_out))
        if missing:
            raise KeyError(f"metrics want outputs {missing}, the model gave {sorted(model_out)}")
        predictions = torch.stack([model_out[task.prediction_name] for task in self._tasks])
        labels = torch.stack([model_out[task.label_name] for task in self._tasks])
        weights = torch.stack(
            [
                model_out.get(task.weight_name, torch.ones_like(predictions[0]))
                for task in self._tasks
            ]
        )
        for metric in self._metrics:
            metric.update(predictions, labels, weights)

    def compute(self) -> dict[str, float]:
        """Give all numbers over all ranks of the group, by key; a collective call."""
        return {key: value for metric in self._metrics for key, value in metric.compute().items()}

    def local_compute(self) -> dict[str, float]:
        """Give all numbers of this rank's examples, by key."""
        return {k: v for metric in self._metrics for k, v in metric.local_compute().items()}
